"""The fakes answer what their docstrings work out."""

import numpy as np
import pytest

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.backend import Residuals, SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from imagemesh_services.text_encoder.backends.fake import FakeTextModel
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.backends.fake import FakeVaeModel
from imagemesh_services.vit.backend import Pooling, Wanted
from imagemesh_services.vit.backends.fake import FakeVitModel

PLAIN = MemoryOptions()


def test_text_tokens_are_code_points_between_start_and_ends():
    assert FakeTextModel().tokenize("hi").windows.tolist() == [[1, 104, 105, 2, 2, 2, 2, 2]]


def test_text_goes_on_in_a_second_window_after_six_characters():
    assert FakeTextModel().tokenize("abcdefg").windows.tolist() == [
        [1, 97, 98, 99, 100, 101, 102, 2],
        [1, 103, 2, 2, 2, 2, 2, 2],
    ]


@pytest.mark.parametrize(("skip", "wanted"), [(0, 0.5), (2, -1.5)])
def test_text_embedding_is_the_token_over_256_less_the_skip(skip, wanted):
    embeds = FakeTextModel().encode(np.array([[128]]), skip).embeds
    np.testing.assert_array_equal(embeds, np.full((1, 1, 4), wanted, np.float32))


def test_vae_decodes_a_latent_to_eight_by_eight_pixels():
    latents = np.array([-0.5, 0.0, 0.5, 9.0], np.float32).reshape(1, 4, 1, 1)
    pictures = FakeVaeModel().decode(latents, PLAIN)
    assert pictures.shape == (1, 8, 8, 3)
    assert np.unique(pictures.reshape(-1, 3), axis=0).tolist() == [[0, 128, 255]]


def test_vae_encodes_the_mean_of_eight_by_eight_pixels():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :4, :, 0] = 255  # half of the red is full
    image[..., 2] = 255
    mean, log_variance = FakeVaeModel().encode(image, PLAIN)
    np.testing.assert_allclose(mean.ravel(), [0, -1, 1, 0], atol=1e-6)
    assert not log_variance.any()


def _inputs(**changes: object) -> SampleInputs:
    conditioning = {
        "prompt_embeds": np.array([[[1, 2, 3, 4], [3, 4, 5, 6]]], np.float32),
        "negative_prompt_embeds": np.ones((1, 2, 4), np.float32),
    }
    values = {"width": 8, "height": 8, "steps": 2, "guidance_scale": 1.0, "scheduler": None, "seeds": (64,)}
    return SampleInputs(conditioning, **(values | changes))  # type: ignore[arg-type]


def test_sampler_starts_at_the_seed_over_256():
    run = FakeDiffusionModel().start(_inputs(seeds=(64, 256 + 128)))
    np.testing.assert_array_equal(run.latents()[:, :, 0, 0], [[0.25] * 4, [0.5] * 4])


def test_sampler_goes_half_way_in_the_first_of_two_steps():
    run = FakeDiffusionModel().start(_inputs())
    run.advance(None)
    np.testing.assert_allclose(run.latents().ravel(), [1.125, 1.625, 2.125, 2.625])


@pytest.mark.parametrize(("guidance", "wanted"), [(1.0, [2, 3, 4, 5]), (3.0, [4, 7, 10, 13])])
def test_sampler_ends_at_the_guided_mean_of_the_prompt(guidance, wanted):
    run = FakeDiffusionModel().start(_inputs(guidance_scale=guidance))
    run.advance(None)
    run.advance(None)
    np.testing.assert_allclose(run.latents().ravel(), wanted)


def test_sampler_adds_the_mean_of_the_middle_residual():
    run = FakeDiffusionModel().start(_inputs(steps=1))
    run.advance(Residuals([], np.array([[1.0, 3.0]], np.float32)))
    np.testing.assert_allclose(run.latents().ravel(), [4, 5, 6, 7])


def test_sampler_refuses_embeddings_of_another_width():
    with pytest.raises(InvalidArgument, match="width 4"):
        FakeDiffusionModel().start(SampleInputs({"prompt_embeds": np.zeros((1, 2, 5))}, 8, 8, 2, 1.0, None, (1,)))


def _colours() -> np.ndarray:
    """A red picture, and one of half green, half black."""
    red, half_green = np.zeros((2, 4, 6, 3), np.uint8)
    red[..., 0] = 255
    half_green[:2, :, 1] = 255
    return np.stack([FakeVitModel().preprocess(image) for image in (red, half_green)])


def test_vit_logits_are_the_mean_colour():
    assert FakeVitModel().classify(_colours()).tolist() == [[1, 0, 0], [0, 0.5, 0]]


@pytest.mark.parametrize(("pooling", "factor"), [(Pooling.CLS, 1), (Pooling.MEAN, 2)])
def test_vit_vectors_are_the_mean_colour_once_or_twice(pooling, factor):
    vectors = FakeVitModel().embed(_colours(), Wanted(pooling)).vectors
    np.testing.assert_array_equal(vectors, factor * np.array([[1, 0, 0], [0, 0.5, 0]], np.float32))


def test_vit_hidden_states_of_red_are_those_of_the_docstring():
    states = FakeVitModel().embed(_colours(), Wanted(layers=(0, 1))).hidden_states
    assert states is not None
    assert states[0].tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 0, 0], [2, 0, 0]]]
