"""What ``backend=auto`` is: a model's engine is the one that was measured to be fastest, else the table's first."""

import dataclasses
import logging
import threading
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.registry import Backend, BackendEntry, ModelCard, Repository, choose_backend
from imagemesh_services.choices import Choice, choices_path, read_choices, versions_of
from imagemesh_services.fingerprint import fingerprint_of

log = logging.getLogger(__name__)
Model = TypeVar("Model")


def open_backend(table: Mapping[str, BackendEntry], config: ModelServerConfig) -> Backend[Any]:
    """The backend that the configuration names.

    Raises:
        InvalidArgument: no such backend, or it has no such device.
        FailedPrecondition: a library that it needs is not installed.
    """
    if config.backend == "auto":
        return Fastest(table, config)
    backend: Backend[Any] = choose_backend(table, config.backend)(config)
    return backend


class Fastest(Generic[Model]):
    """The table's first engine that is here, and for models that were measured the fastest one.

    What was measured is read once; engines but the first are opened when a model needs them.
    """

    def __init__(self, table: Mapping[str, BackendEntry], config: ModelServerConfig) -> None:
        self._table, self._config = table, config
        self._first: Backend[Model] = choose_backend(table, "auto")(config)
        self.name, self.device, self.dtype = self._first.name, self._first.device, self._first.dtype
        self._opened: dict[str, Backend[Model] | None] = {self.name: self._first}
        self._turn = threading.Lock()
        self._measured = self._read()
        self._chosen: dict[str, Choice | None] = {}

    @property
    def repository(self) -> Repository | None:
        """The first engine's; all have the same."""
        return self._first.repository

    def cards(self) -> Mapping[str, ModelCard]:
        cards = dict(self._first.cards())
        for name in cards if self._measured else ():
            engine = self._engine(name)
            if engine is not self._first and name in (others := engine.cards()):
                cards[name] = dataclasses.replace(others[name], engine=engine, otherwise=self._first)
        return cards

    def load(self, name: str) -> Model:
        return self._first.load(name)

    def _read(self) -> dict[object, Choice]:
        versions = versions_of(self._table)
        found = read_choices(choices_path(self._config))
        own = self._config
        mine = (own.SERVICE, own.device, own.dtype, own.threads, versions)
        return {
            one.model: one for one in found if (one.service, one.device, one.dtype, one.threads, one.versions) == mine
        }

    def _engine(self, name: str) -> Backend[Model]:
        """The engine of that model, the first where no other was measured to be better or can be had."""
        with self._turn:
            if name not in self._chosen:
                self._chosen[name] = self._measured.get(self._fingerprint(name))
                self._tell(name, self._chosen[name])
            choice = self._chosen[name]
            if choice is None:
                return self._first
            if choice.engine not in self._opened:
                self._opened[choice.engine] = self._open(choice.engine)
            return self._opened[choice.engine] or self._first

    def _fingerprint(self, name: str) -> str:
        assert self.repository is not None, "models that can be measured lie on a disk"
        return fingerprint_of([self.repository.folders()[name].path])

    def _open(self, name: str) -> Backend[Model] | None:
        try:
            backend: Backend[Model] = choose_backend(self._table, name)(self._config)
        except (FailedPrecondition, InvalidArgument) as error:  # such as a device that only torch has
            log.warning("%s: %s was measured to be fastest and can't be had: %s", self._config.SERVICE, name, error)
            return None
        return backend

    def _tell(self, name: str, choice: Choice | None) -> None:
        if choice is not None:
            told = ", ".join(f"{engine} {seconds * 1e3:.1f} ms" for engine, seconds in choice.seconds.items())
            log.info("%s: %s is run by %s, the fastest of %s", self._config.SERVICE, name, choice.engine, told)
