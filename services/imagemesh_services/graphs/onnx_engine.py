"""Graphs run by ONNX Runtime."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from imagemesh_runtime.errors import FailedPrecondition, shorten
from imagemesh_runtime.tensors import Array
from imagemesh_services.graphs.engine import thread_count
from imagemesh_services.graphs.providers import PROVIDERS, pick_provider, with_options

log = logging.getLogger(__name__)


def open_session(path: Path, device: str, threads: int) -> Any:
    """A session of the ONNX file; ``device`` as ``pick_provider`` answers it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that spin between two forwards would take the cores from everybody else's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device.startswith("directml"):  # which asks for it
        options.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(path, options, providers=with_options(device))
    wanted = PROVIDERS[device.partition(":")[0]]
    if wanted not in session.get_providers():  # it falls back by itself, such as where the device's memory is full
        log.warning("onnxruntime: %s could not take %s, which runs on the CPU", wanted, path.name)
    return session


class OnnxEngine:
    """See ``Engine``.

    Raises:
        InvalidArgument: ONNX Runtime can't use the device here.
    """

    name = "onnxruntime"

    def __init__(self, device: str, threads: int) -> None:
        self.version: str = onnxruntime.__version__
        self.device = pick_provider(device)
        self._threads = thread_count(threads)

    def open(self, path: Path) -> "OnnxGraph":
        try:
            return OnnxGraph(open_session(path, self.device, self._threads))
        except Exception as error:  # ONNX Runtime has no base class for its own
            log.warning("%s: %s", path, error)
            raise FailedPrecondition(f"ONNX Runtime can't run {path.name}: {shorten(str(error))}") from error


class OnnxGraph:
    """See ``Graph``."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        found: Sequence[Array] = self._session.run(None, dict(inputs))
        return found
