"""The pictures to learn from, with their labels: of folders, or of a dataset that the library ``datasets`` saved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from imagemesh_runtime.errors import InvalidArgument, MeshError
from imagemesh_runtime.images import MAX_PIXELS, decode_file

Picture = NDArray[np.uint8]

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
TRAIN: Final = ("train", "training")
VALIDATION: Final = ("validation", "val", "valid", "dev", "test")
_SHOWN: Final = 5  # names that an error lists


class Source(Protocol):
    """Pictures by their number."""

    @property
    def labels(self) -> Sequence[int]:
        """Of each picture, as an index into the names."""

    def name(self, index: int) -> str:
        """What to call the picture in errors."""

    def mark(self, index: int) -> str:
        """Tells whether it is the same picture, whatever lies around its folder; nothing of it is read."""

    def read(self, index: int) -> Picture:
        """The picture, uint8 [height, width, 3].

        Raises:
            MeshError, OSError: it can't be read.
        """


@dataclass(frozen=True)
class Data:
    """What to learn from and what to measure with.

    Attributes:
        names: of the labels, in the order of the head's rows.
        digest: tells whether it is the same data.
    """

    names: Sequence[str]
    train: Source
    validation: Source
    digest: str


@dataclass(frozen=True)
class Files:
    """Pictures in files."""

    files: Sequence[Path]
    labels: Sequence[int]

    def name(self, index: int) -> str:
        return str(self.files[index])

    def mark(self, index: int) -> str:
        return f"{'/'.join(self.files[index].parts[-2:])}\0{self.files[index].stat().st_size}"

    def read(self, index: int) -> Picture:
        return decode_file(self.files[index].read_bytes(), str(self.files[index]))


@dataclass(frozen=True)
class Part:
    """Some pictures of another source."""

    source: Source
    numbers: Sequence[int]
    labels: Sequence[int]

    @classmethod
    def of(cls, source: Source, numbers: Sequence[int]) -> Part:
        """Those with these numbers."""
        return cls(source, numbers, [source.labels[number] for number in numbers])

    def name(self, index: int) -> str:
        return self.source.name(self.numbers[index])

    def mark(self, index: int) -> str:
        return self.source.mark(self.numbers[index])

    def read(self, index: int) -> Picture:
        return self.source.read(self.numbers[index])


def open_data(folder: Path, validation: Path | None, share: float, seed: int) -> Data:
    """The pictures of ``folder``: folders named by their labels, or those in ``train``, or a saved dataset.

    Args:
        validation: a folder likewise to measure with; None: one of the names in ``VALIDATION`` within ``folder``, or
            ``share`` of each label's pictures.

    Raises:
        InvalidArgument: it is not laid out so, there are fewer than two labels, or one has too few pictures.
        FailedPrecondition: it is a dataset, and the library is not installed.
    """
    if _is_dataset(folder):
        from imagemesh_training.finetune.datasets import open_dataset

        names, train, held = open_dataset(folder)
    else:
        names, train, held = _open_folder(folder)
    if validation is not None:
        held = _open_validation(validation, names)
    _check_labels(str(folder), names, train)
    if held is None:
        train, held = _split(str(folder), names, train, share, seed)
    if not held.labels:
        raise InvalidArgument("validation", str(validation or folder), "a folder with pictures of the labels")
    digest = _digest(names, train, held)
    return Data(names, train, held, digest)


def _is_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def _open_folder(folder: Path) -> tuple[list[str], Source, Source | None]:
    train = _first(folder, TRAIN)
    held = _first(folder, VALIDATION) if train is not None else None
    names = sorted(path.name for path in _folders(train or folder))
    if not names:
        raise InvalidArgument("data", str(folder), "a folder with a folder of pictures for each label, named like it")
    return names, _files(train or folder, names), _open_validation(held, names) if held is not None else None


def _open_validation(folder: Path, names: Sequence[str]) -> Source:
    if _is_dataset(folder):
        raise InvalidArgument(
            "validation", str(folder), "a folder with folders of pictures; a dataset has it as a split"
        )
    unknown = sorted({path.name for path in _folders(folder)} - set(names))
    if unknown:
        raise InvalidArgument("validation", str(folder), f"of labels that are learned, which {_listed(unknown)} aren't")
    return _files(folder, names)


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]


def _files(folder: Path, names: Sequence[str]) -> Files:
    found = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    return Files([path for path, _ in found], [label for _, label in found])


def _check_labels(where: str, names: Sequence[str], train: Source) -> None:
    if len(names) < 2:
        raise InvalidArgument("data", where, f"of 2 labels or more, not of {_listed(names) or 'none'} alone")
    counts = np.bincount(np.asarray(train.labels, int), minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        allowed = f"at least one PNG, JPEG or WebP picture of each label, and there is none of {_listed(empty)}"
        raise InvalidArgument("data", where, allowed)


def _split(where: str, names: Sequence[str], source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """``share`` of each label's pictures, one at least, drawn by ``seed``, go into the second."""
    labels = np.asarray(source.labels, int)
    single = [name for label, name in enumerate(names) if (labels == label).sum() < 2]
    if single:
        allowed = "at least 2 pictures of each label, to learn from one and measure with the other (or give a folder to"
        raise InvalidArgument("data", where, f"{allowed} validate with), and there is 1 of {_listed(single)}")
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for label in range(len(names)):
        own = rng.permutation(np.flatnonzero(labels == label))
        held += own[: min(max(round(len(own) * share), 1), len(own) - 1)].tolist()
    kept = sorted(set(range(len(labels))) - set(held))
    return Part.of(source, kept), Part.of(source, sorted(held))


def check_pictures(data: Data, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Read every picture once, so that none ends the run hours later; ``tell`` is told of each.

    Raises:
        InvalidArgument: some can't be read; the error names them.
    """
    total, done = len(data.train.labels) + len(data.validation.labels), 0
    broken: list[str] = []
    for source in (data.train, data.validation):
        for index in range(len(source.labels)):
            try:
                source.read(index)
            except (MeshError, OSError):
                broken.append(source.name(index))
            done += 1
            tell(done, total)
    if broken:
        allowed = f"whole PNG, JPEG or WebP pictures of at most {MAX_PIXELS:,} pixels, unlike {_listed(broken)}"
        raise InvalidArgument("data", f"{len(broken)} of {total} that can't be read", allowed)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _digest(names: Sequence[str], *sources: Source) -> str:
    digest = hashlib.sha256(repr(list(names)).encode())
    for source in sources:
        for index, label in enumerate(source.labels):
            digest.update(f"\0{label}\0{source.mark(index)}".encode())
        digest.update(b"\1")
    return digest.hexdigest()


def tally(data: Data) -> Mapping[str, Any]:
    """What there is, for the record."""
    return {
        "labels": len(data.names),
        "train_pictures": len(data.train.labels),
        "validation_pictures": len(data.validation.labels),
    }
