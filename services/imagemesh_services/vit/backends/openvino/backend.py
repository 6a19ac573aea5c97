"""Folders with a graph of OpenVINO's own or an ONNX one, as Optimum and ``imagemesh export`` write them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import ModelCard, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.graphs.engine import thread_count
from imagemesh_services.graphs.openvino_engine import compiled, new_core, pick_device
from imagemesh_services.repository import open_repository
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.graph import GraphVitModel, graph_card, in_batches, known_name
from imagemesh_services.vit.processors import load_processor
from imagemesh_services.vit.weights import find_weights

log = logging.getLogger(__name__)

FORMATS: Final = ("openvino", "onnx")


class OpenVinoVit:
    """Runs ``openvino_model.xml`` of a folder that also has config.json and preprocessor_config.json."""

    name, dtype = "openvino", "float32"

    def __init__(self, config: VitConfig) -> None:
        self.repository = open_repository(config)
        self._core = new_core()
        self.device = pick_device(config.device, self._core.available_devices)
        self._threads = thread_count(config.threads)

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), lambda folder: graph_card(folder, FORMATS))

    def load(self, name: str) -> GraphVitModel:
        folder = self.repository.folders()[name]
        weights = find_weights(folder.path, FORMATS)
        if weights is None:
            raise FailedPrecondition(f"model {name} has no openvino_model.xml and no model.onnx")
        try:
            graph = OpenVinoGraph(self._core, weights.files[0], self.device, self._threads)
        except RuntimeError as error:
            log.warning("%s: %s", weights.files[0], error)
            raise FailedPrecondition(f"model {name}: {weights.files[0].name} can't be read: {error}") from error
        log.info("vit: %s has its weights from %s (%s)", name, weights.files[0].name, weights.format)
        return GraphVitModel(folder, load_processor(folder.path), graph)


class OpenVinoGraph:
    """A compiled model; see ``vit.graph.Graph``."""

    def __init__(self, core: Any, path: Path, device: str, threads: int) -> None:
        self._compiled = compiled(core, path, device, threads)
        count = self._compiled.inputs[0].get_partial_shape()[0]
        self._rows = count.get_length() if count.is_static else 0  # 0: any number
        self.outputs = [known_name(output.get_names()) for output in self._compiled.outputs]

    def __call__(self, pixels: Array) -> Mapping[str, Array]:
        return in_batches(self._run, pixels, self._rows)

    def _run(self, pixels: Array) -> Mapping[str, Array]:
        found = self._compiled([pixels])
        # Its arrays are views into the request's memory, which the next call writes anew.
        return {name: np.array(found[i], np.float32) for i, name in enumerate(self.outputs)}
