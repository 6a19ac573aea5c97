"""Which files are words of a model, and what is the matter with the others."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagemesh_runtime.registry import ModelFolder
from imagemesh_services.text_encoder.inversions import find_inversions

WIDTH = 8


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    path = tmp_path / "owner" / "model"
    (path / "embeddings").mkdir(parents=True)
    (tmp_path / "embeddings").mkdir()
    return ModelFolder("owner/model", path, {})


def write(path: Path, **tensors: tuple[int, ...]) -> None:
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, path)


def test_words_of_the_model_and_of_the_repository(folder: ModelFolder, tmp_path: Path) -> None:
    write(folder.path / "embeddings" / "own.safetensors", emb_params=(3, WIDTH))
    write(tmp_path / "embeddings" / "shared.safetensors", word=(WIDTH,))
    found = find_inversions(folder, [WIDTH])
    assert {word: one.tokens(word) for word, one in found.usable.items()} == {
        "own": ["own", "own_1", "own_2"],
        "shared": ["shared"],
    }
    assert not found.unusable


def test_the_model_s_own_file_wins(folder: ModelFolder, tmp_path: Path) -> None:
    write(folder.path / "embeddings" / "word.safetensors", emb_params=(3, WIDTH))
    write(tmp_path / "embeddings" / "word.safetensors", emb_params=(1, WIDTH))
    assert find_inversions(folder, [WIDTH]).usable["word"].vectors == 3


def test_the_librarys_own_file_has_its_word_inside(folder: ModelFolder) -> None:
    write(folder.path / "embeddings" / "learned_embeds.safetensors", **{"<cat-toy>": (WIDTH,)})
    assert set(find_inversions(folder, [WIDTH]).usable) == {"<cat-toy>"}


def test_a_pair_is_for_two_encoders_or_for_the_one_that_it_fits(folder: ModelFolder) -> None:
    write(folder.path / "embeddings" / "pair.safetensors", clip_l=(2, WIDTH), clip_g=(2, 12))
    assert find_inversions(folder, [WIDTH, 12]).usable["pair"].keys == ("clip_l", "clip_g")
    assert list(find_inversions(folder, [12]).usable["pair"].keys) == ["clip_g"]
    assert list(find_inversions(folder, [WIDTH]).usable["pair"].keys) == ["clip_l"]


def test_without_a_folder_there_are_no_words(tmp_path: Path) -> None:
    found = find_inversions(ModelFolder("model", tmp_path / "model", {}), [WIDTH])
    assert not found.usable
    assert not found.unusable


@pytest.mark.parametrize(
    ("tensors", "widths", "why"),
    [
        ({"emb_params": (1, 7)}, [WIDTH], "another model: emb_params is 7 wide, the encoder 8"),
        ({"emb_params": (1, WIDTH)}, [WIDTH, 12], "made for one encoder, and the model has 2"),
        ({"clip_l": (1, WIDTH), "clip_g": (1, 13)}, [WIDTH, 12], "clip_g is 13 wide, the encoder 12"),
        ({"clip_l": (1, WIDTH), "clip_g": (2, 12)}, [WIDTH, 12], "not as many vectors for each encoder"),
        ({"a": (1, WIDTH), "b": (1, WIDTH)}, [WIDTH], "no known format: it holds a, b, not one tensor"),
        ({"emb_params": (76, WIDTH)}, [WIDTH], r"not \[width\] or \[1 to 75, width\]"),
        ({"emb_params": (1, 1, WIDTH)}, [WIDTH], r"emb_params is \[1, 1, 8\]"),
        ({"emb_params": (0, WIDTH)}, [WIDTH], r"emb_params is \[0, 8\]"),
        ({}, [WIDTH], "no known format"),
    ],
)
def test_what_does_not_fit_is_named(folder: ModelFolder, tensors: dict, widths: list[int], why: str) -> None:
    write(folder.path / "embeddings" / "word.safetensors", **tensors)
    found = find_inversions(folder, widths)
    assert not found.usable
    assert list(found.unusable) == ["word"]
    assert re.search(why, found.unusable["word"])


@pytest.mark.parametrize("name", ["word.pt", "word.bin", "word.ckpt"])
def test_a_pickle_is_refused_unread(folder: ModelFolder, name: str) -> None:
    (folder.path / "embeddings" / name).write_bytes(b"\x80\x04.")
    assert "is no safetensors file" in find_inversions(folder, [WIDTH]).unusable["word"]


def test_half_a_file_is_refused(folder: ModelFolder) -> None:
    (folder.path / "embeddings" / "word.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    assert "word.safetensors" in find_inversions(folder, [WIDTH]).unusable["word"]
