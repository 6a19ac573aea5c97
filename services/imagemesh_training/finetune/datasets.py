"""Datasets that the library ``datasets`` saved with ``save_to_disk``; imported only where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import decode_file
from imagemesh_training.finetune.pictures import TRAIN, VALIDATION, Picture, Source


@dataclass(frozen=True)
class Rows:
    """Pictures in a split's table; decoded by us, within our bounds."""

    split: str
    table: Any
    image: str
    labels: Sequence[int]

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"

    def mark(self, index: int) -> str:
        return f"{self.table._fingerprint}[{index}]"

    def read(self, index: int) -> Picture:
        cell = self.table[index][self.image]
        if cell is None:
            raise InvalidArgument("data", f"{self.name(index)}.{self.image}", "a picture: it is null")
        data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return decode_file(data, self.name(index))


def open_dataset(folder: Path) -> tuple[list[str], Source, Source | None]:
    """The labels, what to learn from, and what to measure with if there is such a split.

    Raises:
        InvalidArgument: it can't be read, or has no column of pictures or of labels.
    """
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument("data", str(folder), f"a dataset that datasets.load_from_disk reads ({error})") from error
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {TRAIN[0]: found}
    train = next((name for name in TRAIN if name in splits), None)
    if train is None:
        raise InvalidArgument("data", list(splits), f"a dataset with a split called {' or '.join(TRAIN)}")
    held = next((name for name in VALIDATION if name in splits), None)
    image, label = _columns(splits[train])
    names = _names(splits[train], label)
    rows = [_rows(name, splits[name], image, label, names) for name in (train, held) if name is not None]
    return names, rows[0], rows[1] if held is not None else None


def _columns(table: Any) -> tuple[str, str]:
    """The only column of pictures, and that of labels: one of that type, or the one called so."""
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if name in table.features]
    if len(images) != 1 or not labels:
        has = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in table.features.items())
        raise InvalidArgument(
            "data", has, "a dataset with one column of pictures (Image) and one of labels (ClassLabel)"
        )
    return images[0], "label" if "label" in labels else labels[0]


def _names(table: Any, label: str) -> list[str]:
    kind = table.features[label]
    return list(kind.names) if isinstance(kind, datasets.ClassLabel) else sorted({str(one) for one in table[label]})


def _rows(split: str, table: Any, image: str, label: str, names: Sequence[str]) -> Rows:
    if image not in table.features or label not in table.features:
        raise InvalidArgument("data", split, f"a split with the columns {image} and {label}")
    numbers = {name: number for number, name in enumerate(names)}
    known = isinstance(table.features[label], datasets.ClassLabel)
    found = [number if known else numbers.get(str(number), -1) for number in table[label]]
    for index, number in enumerate(found):
        if not 0 <= number < len(names):
            raise InvalidArgument("data", f"{split}[{index}].{label}", f"one of the {len(names)} labels to learn")
    return Rows(split, table.cast_column(image, datasets.Image(decode=False)), image, found)
