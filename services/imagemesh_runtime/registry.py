"""Where models come from and which of them are in memory.

A model is a folder in a repository; its name is the folder's path below the repository's root (``sd15`` or
``stabilityai/sd-turbo``). Names from requests are looked up in the list of folders, never joined to a path.
"""

import asyncio
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Generic, Protocol, TypeVar

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics

log = logging.getLogger(__name__)

# The files that make a folder a model: of a pipeline, and of a single module.
MARKERS = ("model_index.json", "config.json")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk; ``config`` is its model_index.json (a pipeline) or config.json (a single module)."""

    name: str
    path: Path
    config: Mapping[str, Any]

    def has(self, *components: str) -> bool:
        """Whether this is a pipeline that has all of ``components``."""
        entries = [self.config.get(name) for name in components]
        return all(isinstance(entry, list) and entry and entry[0] is not None for entry in entries)

    def read(self, *parts: str) -> dict[str, Any]:
        """A JSON file of the folder, such as ``read("vae", "config.json")``."""
        content: dict[str, Any] = json.loads(self.path.joinpath(*parts).read_text())
        return content


class Repository:
    """Model folders under one or more roots; the first root that has a name wins."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self.roots = tuple(roots)

    @classmethod
    def parse(cls, paths: str) -> "Repository":
        """Roots as in PATH.

        Raises:
            InvalidArgument: a root is no folder.
        """
        roots = [Path(part).expanduser() for part in paths.split(os.pathsep) if part]
        for root in roots:
            if not root.is_dir():
                raise InvalidArgument("models", str(root), "a folder that exists")
        return cls(roots)

    def folders(self) -> dict[str, ModelFolder]:
        """All models by name, read anew from disk."""
        found: dict[str, ModelFolder] = {}
        for root in self.roots:
            seen: set[str] = set()  # in this root, broken ones too: their parts are no models either
            for marker in MARKERS:
                for file in (*sorted(root.glob(f"*/{marker}")), *sorted(root.glob(f"*/*/{marker}"))):
                    name = file.parent.relative_to(root).as_posix()
                    if name in seen or name.rpartition("/")[0] in seen or _hidden(name):
                        continue
                    seen.add(name)
                    if name not in found and (config := _read_config(name, file)) is not None:
                        found[name] = ModelFolder(name, file.parent, config)
        return found


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _read_config(name: str, file: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        log.warning("model folder %s is left out: %s: %s", name, file.name, error)
        return None
    return config


@dataclass(frozen=True)
class ModelCard:
    """What a backend knows of a model without loading it.

    Attributes:
        engine: what runs it, where the backend is several in one.
        otherwise: what runs it where ``engine`` finds that it can't.
    """

    name: str
    properties: Mapping[str, str] = field(default_factory=dict)
    engine: "Backend[Any] | None" = None
    otherwise: "Backend[Any] | None" = None


def cards_of(folders: Iterable[ModelFolder], card: Callable[[ModelFolder], ModelCard | None]) -> dict[str, ModelCard]:
    """What ``card`` says of the folders, by name; None: not a model of this backend's.

    A folder that can't be described, such as one half copied, is left out with a warning, and hides no other.
    """
    found: dict[str, ModelCard] = {}
    for folder in folders:
        try:
            described = card(folder)
        except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            log.warning("model folder %s is left out: %s: %s", folder.name, type(error).__name__, error)
            continue
        if described is not None:
            found[folder.name] = described
    return found


Model = TypeVar("Model")
Model_co = TypeVar("Model_co", covariant=True)


class Backend(Protocol[Model_co]):
    """An engine that can run some models in one role."""

    name: str
    device: str
    dtype: str

    @property
    def repository(self) -> Repository | None:
        """Where its models lie; None: it needs none on a disk."""

    def cards(self) -> Mapping[str, ModelCard]:
        """The models that it can run, by name; called from any thread, since it may read the disk."""

    def load(self, name: str) -> Model_co:
        """Load one of them; called on the lane."""


# Path, size and time of each of a model's files.
_Stamp = frozenset[tuple[str, int, int]]


def _stamp(backend: Backend[Any], name: str) -> _Stamp:
    """Tells whether a model's folder is as it was; empty: it isn't there, or is being changed."""
    folder = backend.repository.folders().get(name) if backend.repository is not None else None
    try:
        files = [(path, path.stat()) for path in folder.path.rglob("*")] if folder is not None else []
    except OSError:
        return frozenset()
    return frozenset((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files)


class LoadedModels(Generic[Model]):
    """Loads each model at its first use, once, on the lane."""

    def __init__(self, backend: Backend[Model], lane: Lane, metrics: Metrics) -> None:
        self.backend = backend
        self.lane = lane
        self._metrics = metrics
        self._loaded: dict[str, Model] = {}
        self._engines: dict[str, Backend[Any]] = {}
        self._stamps: dict[str, _Stamp] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}

    def is_loaded(self, name: str) -> bool:
        """Whether the model is in memory."""
        return name in self._loaded

    def in_memory(self, name: str) -> Model | None:
        """The model, if it is loaded."""
        return self._loaded.get(name)

    def engine_of(self, name: str) -> Backend[Any]:
        """What runs the model, which is loaded."""
        return self._engines.get(name, self.backend)

    async def get(self, name: str) -> Model:
        """The model, loaded. Whoever asks meanwhile waits for the same load, which outlives callers that leave.

        Raises:
            NotFound: the backend has no such model; the error lists what there is.
        """
        while name not in self._loaded:  # again, should it have been unloaded by the time that we come to it
            await asyncio.shield(self._begun(name))
        return self._loaded[name]

    async def refresh(self, name: str) -> bool:
        """Have the model in memory as it is on the disk; answers whether it had to be read.

        One that is in memory stays there, and is used, until the new one is whole; where that fails, for good.

        Raises: as ``get``, and what the backend says of a broken folder.
        """
        if name in self._loading:
            await asyncio.wait([self._loading[name]])
        if name in self._loaded and self._stamps[name] == await asyncio.to_thread(_stamp, self.backend, name):
            return False
        await asyncio.shield(self._begun(name))
        return True

    async def unload(self, name: str) -> bool:
        """Forget the model, whose memory is free once nobody uses it any more; answers whether it was loaded.

        Raises:
            NotFound: it is not loaded, and the backend has no such model.
        """
        if name in self._loading:
            await asyncio.wait([self._loading[name]])
        if name not in self._loaded:
            cards = await asyncio.to_thread(self.backend.cards)  # it reads the disk
            if name not in cards:
                raise NotFound("model", name, cards)
            return False
        for known in (self._loaded, self._engines, self._stamps):
            del known[name]
        log.info("%s: %s unloaded", self._metrics.service, name)
        return True

    def _begun(self, name: str) -> "asyncio.Task[None]":
        """The load of that model that is under way, or a new one."""
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda done: self._settle(name, done))
        return task

    def _settle(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loading[name]  # so that a load that failed can be tried again
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, NotFound):
            log.warning("%s: %s was not loaded: %r", self._metrics.service, name, error)

    async def _load(self, name: str) -> None:
        cards = await asyncio.to_thread(self.backend.cards)  # it reads the disk
        if name not in cards:
            raise NotFound("model", name, cards)
        engine = cards[name].engine or self.backend
        stamp = await asyncio.to_thread(
            _stamp, self.backend, name
        )  # before it is read: what changes meanwhile is newer
        with self._metrics.model_load.time(name):
            try:
                model = await self.lane.run(engine.load, name)
            except FailedPrecondition as error:
                if (other := cards[name].otherwise) is None:
                    raise
                log.warning("%s: %s can't load %s: %s", self._metrics.service, engine.name, name, error)
                engine = other
                model = await self.lane.run(engine.load, name)
        self._engines[name], self._loaded[name], self._stamps[name] = engine, model, stamp
        log.info("%s: %s loaded by %s", self._metrics.service, name, engine.name)


@dataclass(frozen=True)
class BackendEntry:
    """A row of a service's BACKENDS: the class, by "module:name", and the library that it needs."""

    target: str
    library: str | None = None
    # Only by explicit config, never by "auto".
    explicit: bool = False
    # Libraries that it needs besides.
    beside: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether the libraries are here; nothing is imported to find out."""
        return not self.missing

    @property
    def missing(self) -> list[str]:
        """The libraries that aren't here."""
        return [name for name in (self.library, *self.beside) if name and not _is_here(name)]


def choose_backend(table: Mapping[str, BackendEntry], choice: str) -> Any:
    """The backend class that ``choice`` names, or for "auto" the first installed one of the table.

    Raises:
        InvalidArgument: no such backend.
        FailedPrecondition: its library is not installed.
    """
    if choice == "auto":
        candidates = [name for name, entry in table.items() if entry.installed and not entry.explicit]
        if not candidates:
            needed = ", ".join(entry.library for entry in table.values() if entry.library)
            raise FailedPrecondition(f"no backend can run here; install one of: {needed}")
        choice = candidates[0]
    if choice not in table:
        raise InvalidArgument("backend", choice, f"auto or one of {', '.join(table)}")
    entry = table[choice]
    if not entry.installed:
        raise FailedPrecondition(f"backend {choice} needs the package {entry.missing[0]}, which is not installed")
    return resolve_name(entry.target)


def _is_here(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # the package that a dotted name begins with
        return False
