"""Previews: what the model takes the picture to be, small, while it is made."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagemesh_client import Client, MeshError, Progress
from imagemesh_services.diffusion.backend import BACKENDS, SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler
from imagemesh_services.vae.backend import BACKENDS as VAES
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.backends.fake import FakeVaeModel
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vae.preview import fit
from tests.support.backends import load_first
from tests.support.mesh import running_mesh

PROMPT = "a red fox on the water"


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def told(client: Client, **options: Any) -> list[Progress]:
    events = client.stream(PROMPT, seed=3, **{"scheduler": "DDIM", **options})
    return [event for event in events if isinstance(event, Progress)]


def test_every_few_steps_there_is_a_small_jpeg_a_picture(client: Client) -> None:
    events = told(client, steps=7, n=2, preview_every=3, width=64, height=128)
    assert [(event.step, len(event.previews)) for event in events] == [
        (step, 2 if step in (3, 6) else 0) for step in range(1, 8)
    ]
    for shown in (jpeg for event in events for jpeg in event.previews):
        with Image.open(io.BytesIO(shown)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (64, 128))


def test_none_come_unasked_nor_in_the_place_of_the_result(client: Client) -> None:
    assert not any(event.previews for event in told(client, steps=3))
    assert [len(event.previews) for event in told(client, steps=3, preview_every=1)] == [1, 1, 0]


def test_a_step_of_several_evaluations_shows_once(client: Client) -> None:
    assert sum(len(event.previews) for event in told(client, steps=4, scheduler="Heun", preview_every=1)) == 3


def test_the_pictures_are_the_same_with_previews_and_without(client: Client) -> None:
    made = [client.generate(PROMPT, seed=3, steps=4, preview_every=every).images[0] for every in (0, 1)]
    np.testing.assert_array_equal(*(np.asarray(image.to_pil()) for image in made))


def test_more_steps_than_there_can_be_are_refused(client: Client) -> None:
    with pytest.raises(MeshError, match="preview_every must be 0 to 1000, got 1001"):
        told(client, preview_every=1001)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_last_preview_is_where_the_schedule_ends(models: Path, name: str) -> None:
    """At the last evaluation little noise is left, so that the estimate and the result are close; at the first, far."""
    model = load_first(BACKENDS, "torch", DiffusionConfig, models)
    numbers = np.random.default_rng(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    conditioning = {one: numbers.normal(size=(1, 5, 32)).astype(np.float32) for one in names}
    inputs = replace(SampleInputs(conditioning, 64, 64, 12, 3.0, None, (7,)), scheduler=find_scheduler(name))
    run = model.start(inputs)
    shown = []
    for _ in range(run.evaluations):
        assert model.advance([run], [None]) == [None]
        shown.append(run.preview())
    missed = [np.abs(one - run.latents()).mean() for one in (shown[0], shown[-1])]
    assert missed[1] < 0.5 * missed[0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_estimate_is_diffusers(models: Path, kind: str) -> None:
    from diffusers import DDIMScheduler

    from imagemesh_services.diffusion.backends.torch.preview import clean_latents

    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(5)
    sample, predicted = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(predicted, timestep, sample).pred_original_sample
        ours = clean_latents(scheduler, sample, predicted, float(timestep))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_map_of_a_vae_that_is_linear_is_found_exactly() -> None:
    found = fit(FakeVaeModel())
    latents = np.random.default_rng(5).uniform(-0.5, 0.5, (2, 4, 3, 3)).astype(np.float32)
    latents[:, 3] = 0
    seen = np.einsum("nchw,ck->nhwk", latents, found.factors) + found.bias
    decoded = FakeVaeModel().decode(latents, MemoryOptions())[:, ::8, ::8]
    np.testing.assert_allclose((seen + 1) * 127.5, decoded, atol=1)
    assert found.r_squared == pytest.approx(1)


def test_a_real_vaes_colours_are_explained_for_the_most_part() -> None:
    """The shipped model's: colours of patches, from 16 channels."""
    from imagemesh_models import root

    found = fit(load_first(VAES, "torch", VaeConfig, root()))
    assert found.factors.shape == (16, 3)
    assert found.r_squared > 0.7
