"""What every ViT backend promises at its seam."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imagemesh_services.vit.backend import BACKENDS, Pooling, VitModel
from imagemesh_services.vit.config import VitConfig
from tests.support.backends import load_first


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest, models: Path) -> VitModel:
    return load_first(BACKENDS, request.param, VitConfig, models)


@pytest.fixture
def pixels(model) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    # Pictures of noise are nearly alike to the fake, which averages them.
    return np.stack([model.preprocess(image // (i + 1)) for i, image in enumerate(noise)])


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (1, 2000), (37, 91)])
def test_pictures_of_every_size_are_preprocessed_to_one_shape(model, size):
    image = np.full((*size, 3), 128, np.uint8)
    image.flags.writeable = False
    pixels = model.preprocess(image)
    assert pixels.dtype == np.float32
    assert pixels.shape == model.preprocess(np.zeros((64, 64, 3), np.uint8)).shape
    assert len(pixels) == 3


def test_preprocessing_from_many_threads_gives_the_same(model):
    images = np.random.default_rng(1).integers(0, 256, (32, 40, 50, 3), dtype=np.uint8)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(model.preprocess, images))
    np.testing.assert_array_equal(together, [model.preprocess(image) for image in images])


def test_labels_are_distinct_words(model):
    assert all(isinstance(label, str) and label for label in model.labels)
    assert len(set(model.labels)) == len(model.labels)


def test_logits_are_finite_a_column_a_label(model, pixels):
    logits = model.classify(pixels)
    assert logits.dtype == np.float32
    assert logits.shape == (4, len(model.labels))
    assert np.isfinite(logits).all()


def test_other_pictures_give_other_logits(model, pixels):
    logits = model.classify(pixels)
    assert np.abs(logits[0] - logits[3]).max() > 1e-2


@pytest.mark.parametrize("pooling", Pooling)
def test_vectors_and_hidden_states_have_their_shapes(model, pixels, pooling):
    vectors, states = model.embed(pixels, pooling, True)
    assert vectors.dtype == states.dtype == np.float32
    assert vectors.shape == (4, model.width)
    assert states.shape == (4, model.layers + 1, model.tokens, model.width)


@pytest.mark.parametrize("pooling", Pooling)
def test_hidden_states_come_only_when_asked_for_and_change_nothing(model, pixels, pooling):
    vectors, states = model.embed(pixels, pooling, False)
    assert states is None
    np.testing.assert_allclose(vectors, model.embed(pixels, pooling, True).vectors, atol=1e-6)


def test_poolings_differ(model, pixels):
    cls, mean = (model.embed(pixels, pooling, False).vectors for pooling in (Pooling.CLS, Pooling.MEAN))
    assert np.abs(cls - mean).max() > 1e-2


def test_the_same_pixels_give_the_same_answers(model, pixels):
    np.testing.assert_array_equal(model.classify(pixels), model.classify(pixels))
    first, second = (model.embed(pixels, Pooling.CLS, True) for _ in range(2))
    np.testing.assert_array_equal(first.vectors, second.vectors)
    np.testing.assert_array_equal(first.hidden_states, second.hidden_states)


def test_classified_batch_equals_singles(model, pixels):
    singles = np.concatenate([model.classify(row[None]) for row in pixels])
    np.testing.assert_allclose(model.classify(pixels), singles, atol=1e-4)


@pytest.mark.parametrize("pooling", Pooling)
def test_embedded_batch_equals_singles(model, pixels, pooling):
    batch = model.embed(pixels, pooling, True)
    singles = [model.embed(row[None], pooling, True) for row in pixels]
    np.testing.assert_allclose(batch.vectors, np.concatenate([one.vectors for one in singles]), atol=1e-4)
    np.testing.assert_allclose(batch.hidden_states, np.concatenate([one.hidden_states for one in singles]), atol=1e-4)
