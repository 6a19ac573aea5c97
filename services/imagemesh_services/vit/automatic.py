"""What ``backend=auto`` is here: each folder is run by the first engine that reads a format it comes in."""

import dataclasses
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.registry import Backend, ModelCard, choose_backend
from imagemesh_services.vit.backend import BACKENDS, VitModel
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.weights import find_weights

log = logging.getLogger(__name__)


def open_backend(config: VitConfig) -> Backend[VitModel]:
    """The backend that the configuration names.

    Raises:
        InvalidArgument: no such backend.
        FailedPrecondition: its library is not installed.
    """
    if config.backend == "auto":
        return EachByItsFormat(config)
    backend: Backend[VitModel] = choose_backend(BACKENDS, config.backend)(config)
    return backend


class EachByItsFormat:
    """The engines in the table's order; all but the first are opened when a folder needs them."""

    def __init__(self, config: VitConfig) -> None:
        self._config = config
        first: Any = choose_backend(BACKENDS, "auto")(config)
        self._engines: list[Backend[VitModel]] = [first]
        self._rest = [name for name, row in BACKENDS.items() if row.installed and not row.explicit][1:]
        self._opening = threading.Lock()
        self.name, self.device, self.dtype, self.repository = first.name, first.device, first.dtype, first.repository

    def cards(self) -> Mapping[str, ModelCard]:
        found: dict[str, ModelCard] = {}
        for engine in self._opened():
            for name, card in engine.cards().items():
                if name not in found or (_readable(card) and not _readable(found[name])):
                    found[name] = dataclasses.replace(card, engine=engine)
            if not self._unread(found):
                break
        return found

    def load(self, name: str) -> VitModel:
        engine = self.cards()[name].engine
        assert engine is not None
        model: VitModel = engine.load(name)
        return model

    def _opened(self) -> Iterator[Backend[VitModel]]:
        """Every engine in its order, whichever thread opened it; the next one is opened when it is asked for."""
        for i in itertools.count():
            with self._opening:
                while i == len(self._engines) and self._rest:
                    self._open(self._rest.pop(0))
                if i == len(self._engines):
                    return
                engine = self._engines[i]
            yield engine

    def _open(self, name: str) -> None:
        try:
            self._engines.append(choose_backend(BACKENDS, name)(self._config))
        except (FailedPrecondition, InvalidArgument) as error:  # such as a device that only torch has
            log.info("vit: %s is left out: %s", name, error)

    def _unread(self, found: Mapping[str, ModelCard]) -> bool:
        """Whether a folder has a graph, and nothing that an engine so far can read."""
        repository = self.repository
        folders = repository.folders().values() if repository is not None else ()
        return any(
            find_weights(folder.path, ("onnx", "openvino")) is not None
            for folder in folders
            if folder.name not in found or not _readable(found[folder.name])
        )


def _readable(card: ModelCard) -> bool:
    return "format" in card.properties
