"""Engines against each other on this host, a model at a time: what ``imagemesh tune --engines`` measures."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.registry import Backend, BackendEntry, choose_backend
from imagemesh_services.choices import Choice, versions_of
from imagemesh_services.fingerprint import fingerprint_of

log = logging.getLogger(__name__)

# Of a loaded model, the work that is timed.
Work = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Seconds of each engine, a round each, in the table's order."""

    model: str
    seconds: Mapping[str, list[float]]

    @property
    def engine(self) -> str:
        """The fastest, by its median."""
        return min(self.seconds, key=lambda name: median(self.seconds[name]))

    def ratios(self, engine: str) -> list[float]:
        """The first engine's seconds over this one's, a round each: how many times as fast it is."""
        first = next(iter(self.seconds.values()))
        return [a / b for a, b in zip(first, self.seconds[engine], strict=True)]

    def choice(self, table: Mapping[str, BackendEntry], config: ModelServerConfig, backend: Backend[Any]) -> Choice:
        """What ``backend=auto`` reads of it."""
        assert backend.repository is not None
        found = fingerprint_of([backend.repository.folders()[self.model].path])
        medians = {name: median(values) for name, values in self.seconds.items()}
        place = (config.SERVICE, found, config.device, config.dtype, config.threads, versions_of(table))
        return Choice(*place, self.engine, medians)


def open_engines(table: Mapping[str, BackendEntry], config: ModelServerConfig) -> dict[str, Backend[Any]]:
    """The service's engines that can be had here, in the table's order."""
    found: dict[str, Backend[Any]] = {}
    for name, entry in table.items():
        if entry.explicit or not entry.installed:
            continue
        try:
            found[name] = choose_backend(table, name)(config)
        except MeshError as error:  # such as a device that only torch has
            log.warning("%s: %s is left out: %s", config.SERVICE, name, error)
    return found


def time_engines(
    engines: Mapping[str, Backend[Any]],
    name: str,
    trial: Callable[[Any], Work],
    rounds: int,
    clock: Callable[[], float] = perf_counter,
) -> Timed | None:
    """Let each engine that has the model do the same work, in turns whose order alternates.

    An engine that can't do it is left out with a warning; None: none can. All have the model in memory meanwhile.
    """
    works: dict[str, Work] = {}
    for engine, backend in engines.items():
        if name not in backend.cards():
            continue
        try:
            work = trial(backend.load(name))
            work()  # warm up
        except Exception as error:  # each engine has its own
            log.warning("%s: %s is left out: %s", name, engine, error)
            continue
        works[engine] = work
    if not works:
        return None
    seconds: dict[str, list[float]] = {engine: [] for engine in works}
    order = list(works)
    for _ in range(rounds):
        for engine in order:
            begun = clock()
            works[engine]()
            seconds[engine].append(clock() - begun)
        order.reverse()
    return Timed(name, seconds)
