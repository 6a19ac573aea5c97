"""What every text encoder backend promises at its seam."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imagemesh_services.text_encoder.attention import Piece, literal
from imagemesh_services.text_encoder.backend import BACKENDS, TextModel
from imagemesh_services.text_encoder.config import TextEncoderConfig
from tests.support.backends import load_first

LONG = "a red cat on the tree " * 40


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest, models: Path) -> TextModel:
    return load_first(BACKENDS, request.param, TextEncoderConfig, models)


@pytest.mark.parametrize("text", ["", "a cat", "\u00fc\U0001f600\x00\u4e2d"])
def test_short_prompt_is_one_window_of_int64(model, text):
    tokens = model.tokenize(text).windows
    assert tokens.dtype == np.int64
    assert tokens.shape == (1, model.tokenize("").windows.shape[1])


def test_long_prompt_goes_on_in_further_windows(model):
    tokens = model.tokenize(LONG).windows
    inner = tokens.shape[1] - 2
    assert len(tokens) == -(-model.tokenize(LONG).count // inner) > 1


def test_every_window_begins_with_the_start_token(model):
    assert set(model.tokenize(LONG).windows[:, 0]) == {model.tokenize("").windows[0, 0]}


def test_a_text_of_weight_one_is_the_text_itself(model):
    plain, weighted = model.tokenize("a red cat"), model.tokenize_weighted(literal("a red cat"))
    assert plain.weights is weighted.weights is None
    np.testing.assert_array_equal(weighted.windows, plain.windows)


def test_weights_lie_beside_the_tokens_they_are_of(model):
    tokens = model.tokenize_weighted([[Piece("a "), Piece("cat", 1.5)], [Piece("dog", 0.5)]])
    assert tokens.weights is not None
    assert tokens.weights.dtype == np.float32
    assert tokens.weights.shape == tokens.windows.shape
    assert len(tokens.windows) == 2
    assert set(tokens.weights[0].tolist()) == {1.0, 1.5}
    assert set(tokens.weights[1].tolist()) == {1.0, 0.5}
    assert tokens.weights[0, 0] == tokens.weights[0, -1] == 1


def test_widths_are_those_of_the_encoders_side_by_side(model):
    assert sum(model.widths) == model.encode(model.tokenize("a cat").windows, 0).embeds.shape[-1]


def test_empty_prompt_has_no_tokens_of_its_own(model):
    assert model.tokenize("").count == 0


def test_tokenizing_from_many_threads_gives_the_same(model):
    texts = [LONG[:i] for i in range(0, 400, 10)]
    with ThreadPoolExecutor(8) as pool:
        together = [tokens.windows.tolist() for tokens in pool.map(model.tokenize, texts)]
    assert together == [model.tokenize(text).windows.tolist() for text in texts]


def test_embeddings_are_finite_floats_a_row_a_token(model):
    tokens = model.tokenize(LONG).windows
    embeds = model.encode(tokens, 0).embeds
    assert embeds.shape[:2] == tokens.shape
    assert embeds.ndim == 3
    assert embeds.dtype == np.float32
    assert np.isfinite(embeds).all()


def test_the_same_tokens_give_the_same_embeddings(model):
    tokens = model.tokenize("a cat").windows
    np.testing.assert_array_equal(model.encode(tokens, 0).embeds, model.encode(tokens, 0).embeds)


def test_other_prompts_give_other_embeddings(model):
    cat, dog = (model.encode(model.tokenize(text).windows, 0).embeds for text in ("cat", "dog"))
    assert np.abs(cat - dog).max() > 1e-3


def test_batch_equals_singles(model):
    tokens = np.concatenate([model.tokenize(text).windows for text in ("", "a cat", LONG)])
    singles = np.concatenate([model.encode(row[None], 0).embeds for row in tokens])
    np.testing.assert_allclose(model.encode(tokens, 0).embeds, singles, atol=1e-4)


def test_every_clip_skip_below_the_number_of_layers_gives_its_own_embeddings(model):
    tokens = model.tokenize("a cat").windows
    embeds = [model.encode(tokens, skip).embeds for skip in range(model.layers)]
    assert {one.shape for one in embeds} == {embeds[0].shape}
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(embeds))
