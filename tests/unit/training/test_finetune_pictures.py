"""Which pictures are learned from, and what is said of folders that won't do."""

from pathlib import Path

import numpy as np
import pytest

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_training.finetune.augment import changed
from imagemesh_training.finetune.pictures import Data, check_pictures, open_data
from tests.support.labelled import coloured, put_pictures
from tests.support.pictures import png_of_size


def opened(folder: Path, validation: Path | None = None, share: float = 0.25) -> Data:
    return open_data(folder, validation, share, seed=0)


def shown(data: Data) -> list[list[int]]:
    """How many of each label there are to learn from, and to measure with."""
    return [np.bincount(part.labels).tolist() for part in (data.train, data.validation)]


def test_a_share_of_each_label_is_kept_to_measure_with_and_learned_from_never(tmp_path: Path) -> None:
    data = opened(put_pictures(tmp_path, 8))
    assert list(data.names) == ["blue", "green", "red"]
    assert shown(data) == [[6, 6, 6], [2, 2, 2]]
    learned, held = ({part.name(i) for i in range(len(part.labels))} for part in (data.train, data.validation))
    assert len(learned | held) == 24
    for part in (data.train, data.validation):
        assert all(Path(part.name(i)).parent.name == data.names[label] for i, label in enumerate(part.labels))


def test_the_same_seed_keeps_the_same_pictures_wherever_the_folder_is(tmp_path: Path) -> None:
    one, two = (opened(put_pictures(tmp_path / name, 6)) for name in ("one", "two"))
    assert one.digest == two.digest
    assert one.digest != open_data(tmp_path / "one", None, 0.25, seed=1).digest


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_folders_of_splits_are_what_they_are_called(tmp_path: Path, name: str) -> None:
    put_pictures(tmp_path / "train", 3)
    put_pictures(tmp_path / name, 2, seed=1)
    assert shown(opened(tmp_path)) == [[3, 3, 3], [2, 2, 2]]


def test_a_folder_to_validate_with_leaves_all_others_to_learn_from(tmp_path: Path) -> None:
    held = put_pictures(tmp_path / "held", 2, seed=1, names=("green", "red"))
    assert shown(opened(put_pictures(tmp_path / "all", 1), held)) == [[1, 1, 1], [0, 2, 2]]


def test_pictures_read_are_those_that_were_written(tmp_path: Path) -> None:
    data = opened(put_pictures(tmp_path, 2))
    index = next(i for i in range(3) if data.train.labels[i] == 2)
    number = int(Path(data.train.name(index)).stem)
    assert np.array_equal(data.train.read(index), coloured("red", 2000 + number))


def refused(call) -> str:
    with pytest.raises(InvalidArgument) as caught:
        call()
    return str(caught.value)


def test_bad_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "a folder of pictures for each label" in refused(lambda: opened(tmp_path / "none"))
    one = put_pictures(tmp_path / "one", 3, names=("red",))
    assert "data must be of 2 labels or more, not of red alone" in refused(lambda: opened(one))
    single = put_pictures(tmp_path / "single", 1)
    assert "there is 1 of blue, green, red" in refused(lambda: opened(single))
    empty = put_pictures(tmp_path / "empty", 2)
    for path in (empty / "green").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert "there is none of green" in refused(lambda: opened(empty))
    other = put_pictures(tmp_path / "other", 2, names=("blue",))
    (other / "blue").rename(other / "mauve")
    good = put_pictures(tmp_path / "good", 2)
    assert "validation must be of labels that are learned, which mauve aren't" in refused(lambda: opened(good, other))
    assert "validation must be a folder with pictures" in refused(lambda: opened(good, tmp_path / "none"))


def test_broken_pictures_are_named_before_anything_is_learned(tmp_path: Path) -> None:
    data = opened(put_pictures(tmp_path, 4))
    torn, other, bomb = (tmp_path / "red" / f"0{i}.png" for i in range(3))
    torn.write_bytes(torn.read_bytes()[:200])
    other.write_bytes(b"no picture")
    bomb.write_bytes(png_of_size(9000, 9000))
    told = refused(lambda: check_pictures(data))
    assert "3 of 12 that can't be read" in told.replace("\\", "")
    assert all(str(path) in told for path in (torn, other, bomb))


def test_whole_pictures_are_counted_to_the_last(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    check_pictures(opened(put_pictures(tmp_path, 2)), lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_a_picture_is_changed_by_its_epoch_and_number_alone() -> None:
    picture, kinds = coloured("green", 3), ("zoom", "flip", "colour")
    first = changed(picture, kinds, 0, 2, 5)
    assert (first.shape, first.dtype) == (picture.shape, np.uint8)
    assert np.array_equal(first, changed(picture, kinds, 0, 2, 5))
    assert not np.array_equal(first, changed(picture, kinds, 0, 3, 5))
    assert not np.array_equal(first, changed(picture, kinds, 0, 2, 6))
    assert np.array_equal(changed(picture, (), 0, 2, 5), picture)


def test_the_smallest_picture_can_be_changed() -> None:
    assert changed(np.zeros((1, 1, 3), np.uint8), ("zoom", "flip", "colour"), 0, 0, 0).shape == (1, 1, 3)
