"""Folders with an ONNX graph, as Optimum and ``imagemesh export`` write them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import ModelCard, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.graphs.engine import thread_count
from imagemesh_services.graphs.onnx_engine import open_session
from imagemesh_services.graphs.providers import pick_provider
from imagemesh_services.repository import open_repository
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.graph import GraphVitModel, graph_card, in_batches
from imagemesh_services.vit.processors import load_processor
from imagemesh_services.vit.weights import find_weights

log = logging.getLogger(__name__)

FORMATS: Final = ("onnx",)


class OnnxVit:
    """Runs ``model.onnx`` of a folder that also has config.json and preprocessor_config.json."""

    name, dtype = "onnxruntime", "float32"

    def __init__(self, config: VitConfig) -> None:
        self.repository = open_repository(config)
        self.device = pick_provider(config.device)
        self._threads = thread_count(config.threads)

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
        self._session = open_session(path, device, threads)
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
