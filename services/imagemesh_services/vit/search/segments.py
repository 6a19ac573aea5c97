"""An index on disk: files of vectors that never change, and one file that says which of them count.

A change writes one more file and then puts a new ``current.json`` in the place of the old one, in one step of the file
system: who dies in between leaves the old index, and a file that the next change sweeps away. So that a change costs
what changes and not the whole index, files are merged only with smaller or alike ones, as log-structured trees do.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from imagemesh_runtime.tensors import Array

_CURRENT: Final = "current.json"
_FORMAT: Final = 1


@dataclass(frozen=True)
class Segment:
    """A change: ``gone`` ids leave what was before it, then ``ids`` come with their vectors, float32 [ids, width]."""

    ids: Sequence[str]
    vectors: Array
    gone: Sequence[str] = ()


@dataclass(frozen=True)
class Manifest:
    """What ``current.json`` says: the spec's fields, and the files with their weights (ids that came and went)."""

    spec: Mapping[str, Any]
    files: Sequence[tuple[str, int]] = ()


def signature(folder: Path) -> tuple[int, int, int] | None:
    """Changes whenever the index does; None: there is none."""
    try:
        found = (folder / _CURRENT).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_manifest(folder: Path) -> Manifest:
    """The index as it stands.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is another format's.
    """
    told = json.loads((folder / _CURRENT).read_text())
    if told.get("format") != _FORMAT:
        raise ValueError(f"{folder.name}: format {told.get('format')!r} is not {_FORMAT}")
    return Manifest(told["spec"], [(name, weight) for name, weight in told["files"]])


def read_segments(folder: Path, manifest: Manifest) -> Iterator[Segment]:
    """The changes, the oldest first; FileNotFoundError: another process has merged them since."""
    for name, _ in manifest.files:
        with np.load(folder / name, allow_pickle=False) as file:
            ids, gone = (json.loads(file[key].tobytes()) for key in ("ids", "gone"))
            yield Segment(ids, file["vectors"], gone)


def append(folder: Path, manifest: Manifest, change: Segment) -> Manifest:
    """Make a change last; the manifest as it is then. One process at a time may be in here."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = list(manifest.files)
    merged: list[tuple[str, int]] = []
    weight = len(change.ids) + len(change.gone)
    while kept and kept[-1][1] <= 2 * weight:
        merged.insert(0, kept.pop())
        weight += merged[0][1]
    old = read_segments(folder, Manifest(manifest.spec, merged))
    change = _merge([*old, change], first=not kept)
    name = f"{secrets.token_hex(8)}.npz"
    _write(folder / name, change)
    changed = Manifest(manifest.spec, [*kept, (name, len(change.ids) + len(change.gone))])
    _point(folder, changed)
    _sweep(folder, changed)
    return changed


def drop(folder: Path) -> None:
    """Delete an index; without its ``current.json`` the rest of it is rubbish."""
    (folder / _CURRENT).unlink()
    _sync_folder(folder)
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    folder.rmdir()


def _merge(segments: Sequence[Segment], first: bool) -> Segment:
    """The changes as one; the ``first`` of an index needs not tell what goes."""
    if len(segments) == 1:
        return Segment(segments[0].ids, segments[0].vectors, () if first else segments[0].gone)
    place: dict[str, tuple[int, int]] = {}
    gone: dict[str, None] = {}
    for s, segment in enumerate(segments):
        for one in segment.gone:
            place.pop(one, None)
            gone[one] = None
        for row, one in enumerate(segment.ids):
            place.pop(one, None)
            place[one] = (s, row)
    vectors = np.empty((len(place), segments[0].vectors.shape[1]), np.float32)
    for i, (s, row) in enumerate(place.values()):
        vectors[i] = segments[s].vectors[row]
    return Segment(list(place), vectors, () if first else list(gone))


def _write(path: Path, segment: Segment) -> None:
    lists = {"ids": list(segment.ids), "gone": list(segment.gone)}
    arrays: dict[str, Any] = {key: np.frombuffer(json.dumps(value).encode(), np.uint8) for key, value in lists.items()}
    with path.open("xb") as file:
        np.savez(file, vectors=np.asarray(segment.vectors, np.float32), **arrays)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _point(folder: Path, manifest: Manifest) -> None:
    unfinished = folder / f"{_CURRENT}.part"
    with unfinished.open("w") as file:
        json.dump({"format": _FORMAT, "spec": dict(manifest.spec), "files": list(manifest.files)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / _CURRENT)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def _sweep(folder: Path, manifest: Manifest) -> None:
    """Delete what a merge, or a process that was killed, has left."""
    wanted = {_CURRENT, *(name for name, _ in manifest.files)}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
