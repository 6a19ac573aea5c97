"""A torch module as an ONNX graph."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_services.torch_support import building

OPSET: Final = 17  # has layer normalisation as one operator; every runtime of the last years knows it


@dataclass(frozen=True)
class Traced:
    """A module and how it is called.

    Attributes:
        inputs: examples by name, in the order of ``forward``'s arguments.
        outputs: names of the tensors that ``forward`` answers.
        free: axes of inputs and outputs whose length isn't fixed, with a word for each.
        name: what an error calls the module; empty: its class.
    """

    module: Any
    inputs: Mapping[str, torch.Tensor]
    outputs: Sequence[str]
    free: Mapping[str, Mapping[int, str]]
    name: str = ""


@torch.inference_mode()
def write_onnx(traced: Traced, path: Path) -> None:
    """Write the graph; the exporter puts weights beside it where they don't go into one file of 2 GiB.

    It is traced: the newer exporter gives the same operators and takes thirty times as long.

    Raises:
        FailedPrecondition: the module has an operator that ONNX has not.
    """
    # The exporter has state of the whole process, and patches what loads would meet.
    with building(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing makes a constant: none of it is free here
        try:
            torch.onnx.export(
                traced.module,
                tuple(traced.inputs.values()),
                str(path),  # of a path it would not know where to put what exceeds one file
                input_names=[*traced.inputs],
                output_names=[*traced.outputs],
                dynamic_axes={name: dict(axes) for name, axes in traced.free.items()},
                opset_version=OPSET,
                dynamo=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            what = traced.name or type(traced.module).__name__
            raise FailedPrecondition(f"{what} can't be an ONNX graph: {str(error).splitlines()[0]}") from error
