"""faiss in this process, over files of a folder; docs/decisions/search-index.md says why it looks at every vector."""

import fcntl
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import faiss
import numpy as np

from imagemesh_runtime.errors import FailedPrecondition, NotFound
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search import segments
from imagemesh_services.vit.search.folder import index_root
from imagemesh_services.vit.search.segments import Manifest, Segment
from imagemesh_services.vit.search.store import Hit, IndexSpec, Pair, as_cosine, check_room, spec_fields, spec_of

log = logging.getLogger(__name__)

_BLOCK: Final = 256  # vectors whose pairs are looked for at a time,
_ACROSS: Final = 2048  # among so many: of pictures that are all alike, each with each is a pair
_PIECE: Final = 1024  # vectors that are told at a time
_TRIES: Final = 5


@dataclass
class _Open:
    """An index in memory; ``keys`` are faiss' numbers of the ids, which are never given twice."""

    signature: tuple[int, int, int]
    manifest: Manifest
    vectors: Any
    keys: dict[str, int]
    ids: dict[int, str]
    next_key: int = 0

    def apply(self, change: Segment) -> None:
        """Take a change over, as the files have it."""
        old = [self.keys.pop(one) for one in (*change.gone, *change.ids) if one in self.keys]
        if old:
            self.vectors.remove_ids(np.array(old, np.int64))
            for key in old:
                del self.ids[key]
        new = np.arange(self.next_key, self.next_key + len(change.ids))
        self.next_key += len(change.ids)
        self.keys.update(zip(change.ids, new.tolist(), strict=True))
        self.ids.update(zip(new.tolist(), change.ids, strict=True))
        if change.ids:
            self.vectors.add_with_ids(np.ascontiguousarray(change.vectors, np.float32), new)


class EmbeddedStore:
    """A folder an index below ``index_root``, which several processes may share: writers take turns, readers notice."""

    name = "faiss"

    def __init__(self, config: VitConfig) -> None:
        self._root = index_root(config)
        self._config = config
        self._open: dict[str, _Open] = {}
        self._root.mkdir(parents=True, exist_ok=True)

    def specs(self) -> Mapping[str, IndexSpec]:
        found: dict[str, IndexSpec] = {}
        for folder in sorted(self._root.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                try:
                    found[folder.name] = _spec(folder.name, segments.read_manifest(folder))
                except FileNotFoundError:
                    continue
                except (ValueError, KeyError, TypeError) as error:
                    log.warning("index %s is left out: %s", folder.name, error)
        return found

    def spec(self, name: str) -> IndexSpec:
        return _spec(name, self._current(name).manifest)

    def count(self, name: str) -> int:
        return len(self._current(name).keys)

    def put(self, spec: IndexSpec, ids: Sequence[str], vectors: Array) -> int:
        with self._writing():
            if segments.signature(self._root / spec.name) is None:
                manifest, held, known = Manifest(spec_fields(spec)), {}, None
            else:
                index = self._current(spec.name)
                manifest, held, known = index.manifest, index.keys, _spec(spec.name, index.manifest)
            replaced = sum(one in held for one in ids)
            check_room(self._config, spec, known, len(held), len(ids) - replaced, self.specs)
            self._change(spec.name, manifest, Segment(ids, vectors))
        return replaced

    def remove(self, name: str, ids: Sequence[str]) -> int:
        with self._writing():
            index = self._current(name)
            there = [one for one in dict.fromkeys(ids) if one in index.keys]
            if there:
                none = np.zeros((0, index.vectors.d), np.float32)
                self._change(name, index.manifest, Segment([], none, there))
        return len(there)

    def search(self, name: str, vectors: Array, k: int) -> list[list[Hit]]:
        index = self._current(name)
        k = min(k, len(index.keys))
        if k == 0:
            return [[] for _ in vectors]
        similarities, keys = index.vectors.search(np.ascontiguousarray(vectors, np.float32), k)
        return [
            [Hit(index.ids[key], as_cosine(value)) for key, value in zip(*row, strict=True)]
            for row in zip(keys.tolist(), similarities.tolist(), strict=True)
        ]

    def vectors(self, name: str) -> Iterator[tuple[list[str], Array]]:
        every = list(self._current(name).keys)
        for start in range(0, len(every), _PIECE):
            index = self._current(name)
            ids = [one for one in every[start : start + _PIECE] if one in index.keys]
            if ids:
                yield ids, np.stack([index.vectors.reconstruct(index.keys[one]) for one in ids])

    def similar_pairs(self, name: str, least: float) -> Iterator[list[Pair]]:
        every = list(self._current(name).keys)
        for start in range(0, len(every), _BLOCK):
            block = range(start, min(start + _BLOCK, len(every)))
            for other in range(start, len(every), _ACROSS):
                yield _pairs(self._current(name), every, block, range(other, min(other + _ACROSS, len(every))), least)

    def delete(self, name: str) -> None:
        with self._writing():
            self._current(name)
            segments.drop(self._root / name)
            del self._open[name]

    def _change(self, name: str, manifest: Manifest, change: Segment) -> None:
        folder = self._root / name
        changed = segments.append(folder, manifest, change)
        seen = segments.signature(folder)
        assert seen is not None
        if name not in self._open:
            self._open[name] = _empty(seen, changed)
        self._open[name].apply(change)
        self._open[name].manifest, self._open[name].signature = changed, seen

    def _current(self, name: str) -> _Open:
        """The index as it is on the disk, read if this process has not seen it so yet."""
        folder = self._root / name
        for _ in range(_TRIES):
            seen = segments.signature(folder)
            if seen is None:
                self._open.pop(name, None)
                raise NotFound("index", name, self.specs())
            if name not in self._open or self._open[name].signature != seen:
                try:
                    manifest = segments.read_manifest(folder)
                    index = _empty(seen, manifest)
                    for change in segments.read_segments(folder, manifest):
                        index.apply(change)
                except FileNotFoundError:  # merged or deleted by another process
                    continue
                self._open[name] = index
            return self._open[name]
        raise FailedPrecondition(f"index {name} refers to files that are not there")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, also among processes; the lock goes with a process that dies."""
        with (self._root / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _empty(seen: tuple[int, int, int], manifest: Manifest) -> _Open:
    return _Open(seen, manifest, faiss.IndexIDMap2(faiss.IndexFlatIP(manifest.spec["width"])), {}, {})


def _spec(name: str, manifest: Manifest) -> IndexSpec:
    return spec_of(name, manifest.spec)


def _pairs(index: _Open, every: Sequence[str], block: range, others: range, least: float) -> list[Pair]:
    """Of the block's pictures with those among the others that come later in ``every``."""
    (rows, left), (columns, right) = (_held(index, every, numbers) for numbers in (block, others))
    similarities = left @ right.T
    # Rounding may be against a pair of equals.
    found = np.argwhere((similarities > least - 1e-6) & (rows[:, None] < columns))
    pairs = []
    for i, j in found.tolist():
        first, second = sorted((every[rows[i]], every[columns[j]]))
        pairs.append(Pair(first, second, as_cosine(float(similarities[i, j]))))
    return pairs


def _held(index: _Open, every: Sequence[str], numbers: range) -> tuple[Array, Array]:
    """Those of the pictures that are still there, by their places in ``every``, and their vectors."""
    there = np.array([number for number in numbers if every[number] in index.keys], np.int64)
    keys = np.array([index.keys[every[number]] for number in there], np.int64)
    if not len(keys):
        return there, np.zeros((0, index.vectors.d), np.float32)
    return there, index.vectors.reconstruct_batch(keys)
