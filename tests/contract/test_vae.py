"""What every VAE backend promises at its seam."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from imagemesh_services.vae.backend import BACKENDS, MemoryOptions, VaeModel
from imagemesh_services.vae.config import VaeConfig
from tests.support.backends import load_first

PLAIN = MemoryOptions()


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest, models: Path) -> VaeModel:
    return load_first(BACKENDS, request.param, VaeConfig, models)


@pytest.fixture
def latents(model) -> np.ndarray:
    array = np.random.default_rng(0).normal(scale=0.3, size=(3, model.channels, 16, 8)).astype(np.float32)
    array.flags.writeable = False  # as arrays that share a message's memory are
    return array


@pytest.fixture
def images(model) -> np.ndarray:
    side = model.scale_factor
    array = np.random.default_rng(1).integers(0, 256, (3, 4 * side, 2 * side, 3), dtype=np.uint8)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_decodes_every_float_type_to_uint8_pictures(model, latents, dtype):
    pictures = model.decode(latents.astype(dtype), PLAIN)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, 16 * model.scale_factor, 8 * model.scale_factor, 3)


def test_encodes_to_mean_and_log_variance(model, images):
    mean, log_variance = model.encode(images, PLAIN)
    assert mean.shape == log_variance.shape == (3, model.channels, 4, 2)
    assert mean.dtype == log_variance.dtype == np.float32
    assert np.isfinite(mean).all()
    assert np.isfinite(log_variance).all()


def test_the_same_latents_give_the_same_pictures(model, latents):
    np.testing.assert_array_equal(model.decode(latents, PLAIN), model.decode(latents, PLAIN))


def test_the_same_pictures_give_the_same_posterior(model, images):
    np.testing.assert_array_equal(model.encode(images, PLAIN), model.encode(images, PLAIN))


def test_decoded_batch_equals_singles(model, latents):
    singles = np.concatenate([model.decode(row[None], PLAIN) for row in latents])
    assert _apart(model.decode(latents, PLAIN), singles) <= 1


def test_encoded_batch_equals_singles(model, images):
    singles = np.concatenate([model.encode(row[None], PLAIN) for row in images], axis=1)
    np.testing.assert_allclose(model.encode(images, PLAIN), singles, atol=1e-4)


def test_sliced_equals_unsliced(model, latents, images):
    sliced = MemoryOptions(sliced=True)
    assert _apart(model.decode(latents, sliced), model.decode(latents, PLAIN)) <= 1
    np.testing.assert_allclose(model.encode(images, sliced), model.encode(images, PLAIN), atol=1e-4)


def test_tiled_has_the_shape_of_untiled(model, latents):
    assert model.decode(latents, MemoryOptions(tiled=True)).shape == model.decode(latents, PLAIN).shape


def test_options_of_one_call_do_not_reach_the_next(model, latents):
    before = model.decode(latents, PLAIN)
    model.decode(latents, MemoryOptions(tiled=True, sliced=True))
    np.testing.assert_array_equal(model.decode(latents, PLAIN), before)


def test_other_latents_give_other_pictures(model, latents):
    assert _apart(model.decode(latents, PLAIN), model.decode(-latents, PLAIN)) > 10


def test_scale_is_usable(model):
    assert model.scaling_factor > 0
    assert model.scale_factor >= 1
    assert np.isfinite(model.shift_factor)


def _apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())
