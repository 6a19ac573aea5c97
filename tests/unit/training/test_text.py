"""The text encoder is asked what a caption says from its end token on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from imagemesh_training import data, tokenizer, train_text
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


def test_the_answers_are_the_scenes(words: CLIPTokenizer) -> None:
    scene = data.Scene(7, "pink", "small", "top")
    thing, colour, size, place = train_text.answers_of(scene)
    assert (thing, list(data.COLOURS)[colour], data.SIZES[size], data.PLACES[place]) == (7, "pink", "small", "top")


def test_a_few_steps_learn_something_and_a_text_encoder_is_written(tmp_path: Path) -> None:
    train_text.main(["--work", str(tmp_path), "--steps", "2", "--batch", "4"])
    words = tokenizer.build(tmp_path / "tokenizer")
    taught = type(new_text_encoder(words)).from_pretrained(tmp_path / "text_encoder")
    states = taught(torch.tensor([words("a fox", padding="max_length").input_ids])).last_hidden_state
    assert states.shape == (1, 77, 128)
    assert bool(states.isfinite().all())
