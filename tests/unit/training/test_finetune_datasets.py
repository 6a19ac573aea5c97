"""Datasets that the library saved are learned from like folders."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_training.finetune.pictures import check_pictures, open_data
from tests.support.labelled import coloured

NAMES = ("green", "red")


def png(name: str, seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(coloured(name, seed)).save(file, "PNG")
    return file.getvalue()


def rows(count: int, labels: list, kind: object = None) -> datasets.Dataset:
    """``count`` of each name, in turns."""
    files = [{"bytes": png(name, i), "path": None} for i in range(count) for name in NAMES]
    features = datasets.Features({"picture": datasets.Image(), "label": kind or datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"picture": files, "label": labels}, features=features)


def test_splits_are_taken_as_they_are_called(tmp_path: Path) -> None:
    saved = datasets.DatasetDict({"train": rows(3, [0, 1] * 3), "test": rows(2, [0, 1] * 2)})
    saved.save_to_disk(str(tmp_path / "set"))
    data = open_data(tmp_path / "set", None, 0.5, seed=0)
    assert (list(data.names), list(data.train.labels), list(data.validation.labels)) == (
        ["green", "red"], [0, 1] * 3, [0, 1] * 2,
    )  # fmt: skip
    check_pictures(data)
    assert np.array_equal(data.train.read(3), coloured("red", 1))
    assert open_data(tmp_path / "set", None, 0.5, seed=0).digest == data.digest


def test_labels_in_words_are_numbered_and_a_share_is_kept_back(tmp_path: Path) -> None:
    rows(4, ["green", "red"] * 4, datasets.Value("string")).save_to_disk(str(tmp_path / "set"))
    data = open_data(tmp_path / "set", None, 0.25, seed=0)
    assert list(data.names) == ["green", "red"]
    assert [np.bincount(part.labels).tolist() for part in (data.train, data.validation)] == [[3, 3], [1, 1]]


def test_what_can_not_be_learned_from_is_told(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(InvalidArgument) as caught:
            check_pictures(open_data(tmp_path / name, None, 0.5, seed=0))
        return str(caught.value)

    rows(2, [0, 1] * 2).remove_columns("picture").save_to_disk(str(tmp_path / "blind"))
    assert "one column of pictures (Image) and one of labels (ClassLabel), got 'label (ClassLabel)'" in refused("blind")
    rows(2, [0, -1] * 2).save_to_disk(str(tmp_path / "unlabelled"))
    assert "one of the 2 labels to learn, got 'train[1].label'" in refused("unlabelled")
    datasets.DatasetDict({"rest": rows(2, [0, 1] * 2)}).save_to_disk(str(tmp_path / "unsplit"))
    assert "a dataset with a split called train or training" in refused("unsplit")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "state.json").write_text("{")
    assert "a dataset that datasets.load_from_disk reads" in refused("torn")
    bad = datasets.Dataset.from_dict(
        {"picture": [{"bytes": b"none", "path": None}] * 4, "label": [0, 1] * 2}, rows(1, [0, 1]).features
    )
    bad.save_to_disk(str(tmp_path / "broken"))
    assert "train[1]" in refused("broken")
    cells = [{"bytes": png("red", 0), "path": None}, None] * 2
    datasets.Dataset.from_dict({"picture": cells, "label": [0, 1] * 2}, rows(1, [0, 1]).features).save_to_disk(
        str(tmp_path / "empty")
    )
    assert '"2 of 4 that can\'t be read"' in (told := refused("empty"))
    assert "train[1]" in told
