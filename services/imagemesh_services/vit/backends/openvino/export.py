"""An ONNX graph in OpenVINO's own format."""

from pathlib import Path

import openvino


def export_openvino(onnx: Path, target: Path) -> None:
    """Write ``target`` (.xml) and the weights beside it (.bin), in float32."""
    openvino.save_model(openvino.convert_model(onnx), target, compress_to_fp16=False)
