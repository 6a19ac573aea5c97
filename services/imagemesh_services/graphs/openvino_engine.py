"""Graphs run by OpenVINO."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, shorten
from imagemesh_runtime.tensors import Array
from imagemesh_services.graphs.engine import thread_count

# OpenVINO reports each import of it over the network unless this package of its own is missing. Nothing that imagemesh
# runs may call out by itself.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402

log = logging.getLogger(__name__)


def new_core() -> Any:
    """OpenVINO's entry; import it by this alone, see above."""
    return openvino.Core()


def pick_device(choice: str, here: Sequence[str]) -> str:
    """OpenVINO's device that ``choice`` names, "auto": the CPU.

    Args:
        here: the devices that there are, by OpenVINO's names, such as "CPU" and "GPU.0".

    Raises:
        InvalidArgument: OpenVINO has no such device here.
    """
    device = "CPU" if choice == "auto" else choice.upper()
    if device not in here:
        raise InvalidArgument("device", choice, f"auto or one of {', '.join(one.lower() for one in here)}")
    return device


def compiled(core: Any, path: Path, device: str, threads: int) -> Any:
    """A compiled model of an ONNX file or one of OpenVINO's own, in float32."""
    # On some processors OpenVINO would compute in half precision unless told; a model is served as it was made.
    settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"}
    if device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = threads
    return core.compile_model(core.read_model(path), device, settings)


class OpenVinoEngine:
    """See ``Engine``.

    Raises:
        InvalidArgument: OpenVINO has no such device here.
    """

    name = "openvino"

    def __init__(self, device: str, threads: int) -> None:
        self._core = new_core()
        self.version: str = openvino.__version__
        self._device = pick_device(device, self._core.available_devices)
        self.device = self._device.lower()
        self._threads = thread_count(threads)

    def open(self, path: Path) -> "OpenVinoGraph":
        try:
            return OpenVinoGraph(compiled(self._core, path, self._device, self._threads))
        except RuntimeError as error:
            log.warning("%s: %s", path, error)
            raise FailedPrecondition(f"OpenVINO can't run {path.name}: {shorten(str(error))}") from error


class OpenVinoGraph:
    """See ``Graph``."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        found = self._model(dict(inputs))
        # Its arrays are views into the request's memory, which the next call writes anew.
        return [np.array(found[i]) for i in range(len(self._model.outputs))]
