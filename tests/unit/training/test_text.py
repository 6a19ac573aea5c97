"""The text encoder is asked what a caption says from its end token on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from imagemesh_training import data, tokenizer, train_text
from imagemesh_training.captions import caption
from imagemesh_training.train_unet import new_text_encoder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return tokenizer.build(tmp_path_factory.mktemp("tokenizer"))


def test_only_positions_that_have_read_the_whole_caption_are_asked(words: CLIPTokenizer) -> None:
    texts = ["a fox", "a small red apple on the left on a blue background"]
    ids = words(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    at = train_text.positions(ids, words.eos_token_id, np.random.default_rng(0), count=50)
    assert at.shape == (2, 51)
    for row, positions in zip(ids, at, strict=True):
        assert set(row[positions].tolist()) == {words.eos_token_id}
        assert row[positions[0] - 1] != words.eos_token_id


def test_the_positions_that_are_read_hold_every_caption_and_the_sketch(words: CLIPTokenizer) -> None:
    rng = np.random.default_rng(0)
    lengths = [len(words(caption(data.random_scene(rng), rng)).input_ids) for _ in range(3000)]
    assert max(lengths) <= train_text.CAPTION
    drawn = [train_text.some_positions(rng).tolist() for _ in range(50)]
    assert all(kept == sorted(set(kept)) for kept in drawn)
    assert all(set(range(train_text.CAPTION)) | set(range(61, 77)) <= set(kept) for kept in drawn)
    assert set().union(*drawn) == set(range(77))


def test_the_answers_are_the_scenes(words: CLIPTokenizer) -> None:
    scene = data.Scene(7, "pink", "small", "top")
    thing, colour, size, place = train_text.answers_of(scene)
    assert (thing, list(data.COLOURS)[colour], data.SIZES[size], data.PLACES[place]) == (7, "pink", "small", "top")


def test_a_few_steps_learn_something_and_a_text_encoder_is_written(tmp_path: Path, quick_vae: AutoencoderKL) -> None:
    quick_vae.save_pretrained(tmp_path / "vae")
    train_text.main(["--work", str(tmp_path), "--steps", "2", "--batch", "4", "--pictures", "0"])
    words = tokenizer.build(tmp_path / "tokenizer")
    taught = type(new_text_encoder(words)).from_pretrained(tmp_path / "text_encoder")
    states = taught(torch.tensor([words("a fox", padding="max_length").input_ids])).last_hidden_state
    assert states.shape == (1, 77, 128)
    assert bool(states.isfinite().all())


def test_a_sketch_s_rows_are_the_picture_s_16ths_row_by_row() -> None:
    looks = torch.zeros(1, 16, 8, 8)
    looks[0, 5, 2:4, 6:8] = 1  # the second row of a 4x4 grid, its last column
    rows = train_text.patches(looks)
    assert rows.shape == (1, train_text.SKETCH, train_text.PATCH)
    assert rows[0].sum(1).nonzero().flatten().tolist() == [7]
    assert int(rows[0, 7].sum()) == 4
