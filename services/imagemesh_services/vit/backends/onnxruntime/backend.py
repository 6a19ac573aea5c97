"""Folders with an ONNX graph, as Optimum and ``imagemesh export`` write them."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.registry import ModelCard, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.repository import open_repository
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.graph import GraphVitModel, graph_card, in_batches
from imagemesh_services.vit.processors import load_processor
from imagemesh_services.vit.weights import find_weights

log = logging.getLogger(__name__)

FORMATS: Final = ("onnx",)
_PROVIDERS: Final = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}  # the best first


class OnnxVit:
    """Runs ``model.onnx`` of a folder that also has config.json and preprocessor_config.json."""

    name, dtype = "onnxruntime", "float32"

    def __init__(self, config: VitConfig) -> None:
        self.repository = open_repository(config)
        self.device = _pick(config.device)
        self._threads = config.threads or len(os.sched_getaffinity(0))

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), lambda folder: graph_card(folder, FORMATS))

    def load(self, name: str) -> GraphVitModel:
        folder = self.repository.folders()[name]
        weights = find_weights(folder.path, FORMATS)
        if weights is None:
            raise FailedPrecondition(f"model {name} has no model.onnx")
        try:
            graph = OnnxGraph(weights.files[0], self.device, self._threads)
        except Exception as error:  # ONNX Runtime has no base class for its own
            log.warning("%s: %s", weights.files[0], error)
            raise FailedPrecondition(f"model {name}: {weights.files[0].name} can't be read: {error}") from error
        log.info("vit: %s has its weights from %s (%s)", name, weights.files[0].name, weights.format)
        return GraphVitModel(folder, load_processor(folder.path), graph)


class OnnxGraph:
    """A session; see ``vit.graph.Graph``."""

    def __init__(self, path: Path, device: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Threads that spin between two forwards would take the cores from everybody else's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=[_PROVIDERS[device]])
        given = self._session.get_inputs()[0]
        self._input, self._half = given.name, given.type == "tensor(float16)"
        self._rows = given.shape[0] if isinstance(given.shape[0], int) else 0  # 0: any number
        self.outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, pixels: Array) -> Mapping[str, Array]:
        pixels = pixels.astype(np.float16) if self._half else pixels
        return in_batches(self._run, pixels, self._rows)

    def _run(self, pixels: Array) -> dict[str, Any]:
        found = self._session.run(None, {self._input: pixels})
        return {name: array.astype(np.float32, copy=False) for name, array in zip(self.outputs, found, strict=True)}


def _pick(choice: str) -> str:
    """The device that ``choice`` names; "auto" prefers an accelerator.

    Raises:
        InvalidArgument: this ONNX Runtime can't use it.
    """
    here = [name for name, provider in _PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
    if choice == "auto":
        return here[0]
    if choice not in here:
        raise InvalidArgument("device", choice, f"auto or one of {', '.join(here)}")
    return choice
