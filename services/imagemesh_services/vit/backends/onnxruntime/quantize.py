"""Smaller weights for an ONNX graph, by onnxruntime's own quantizers; no training."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from imagemesh_runtime.tensors import Array

_BLOCK: Final = 32  # weights that share a scale, of int4
_CALIBRATED: Final = 8  # pictures of a forward


def int8_dynamic(source: Path, target: Path, pixels: Sequence[Array]) -> None:
    """Weights of the linear layers in int8, a scale a channel; activations are scaled anew in every forward."""
    quantize_dynamic(
        source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def int8_static(source: Path, target: Path, pixels: Sequence[Array]) -> None:
    """Weights and activations of the linear layers in int8; the activations' scales come from ``pixels``."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            prepared, target, _Pictures(prepared, pixels), quant_format=QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"], nodes_to_exclude=_without_weights(prepared),
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def int4(source: Path, target: Path, pixels: Sequence[Array]) -> None:
    """Weights of the linear layers in int4, a scale for every 32 of them; computing stays in float32."""
    # Imported, it sets up the logging of the whole process.
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=_BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


SCHEMES: Final[Mapping[str, Callable[[Path, Path, Sequence[Array]], None]]] = {
    "int8-dynamic": int8_dynamic,
    "int8-static": int8_static,
    "int4": int4,
}


class _Pictures(CalibrationDataReader):  # type: ignore[misc]
    """Preprocessed pictures, float32 [3, h, w] each, for the calibration."""

    def __init__(self, graph: Path, pixels: Sequence[Array]) -> None:
        name = onnx.load(graph, load_external_data=False).graph.input[0].name
        starts = range(0, len(pixels), _CALIBRATED)
        self._left: Iterator[dict[str, Any]] = iter([{name: np.stack(pixels[i : i + _CALIBRATED])} for i in starts])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def _without_weights(graph: Path) -> list[str]:
    """The products of two activations, as in attention: they stay in float32."""
    content = onnx.load(graph).graph
    constant = {tensor.name for tensor in content.initializer}
    return [node.name for node in content.node if node.op_type == "MatMul" and node.input[1] not in constant]
