"""Image to image and inpainting draw what diffusers' pipelines draw, alone and in a crowd; wrong input is named."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from imagemesh_client import AsyncClient, Client
from imagemesh_runtime.errors import MeshError
from tests.support.mesh import running_mesh
from tests.support.reference import pipeline, scheduler, worst

PROMPT = "a red fox on the water"
SCHEDULERS = ("DDIM", "Euler a", "DPM++ 2M Karras", "Heun", "PNDM", "DPM++ SDE", "UniPC", "LCM")


@pytest.fixture(scope="module")
def mesh(models: Path) -> Iterator[Any]:
    with running_mesh(models=str(models), backend="torch") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def client(mesh: Any) -> Iterator[Client]:
    with Client(mesh.grpc_address) as client:
        yield client


def a_picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    numbers = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(numbers).resize(size, Image.Resampling.BICUBIC)


def a_mask(size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("RGB", size, "black")
    ImageDraw.Draw(mask).rectangle((size[0] // 4, size[1] // 4, size[0] - 9, size[1] // 2), fill="white")
    return mask


def reference(models: Path, kind: type, name: str, seed: int, **settings: Any) -> np.ndarray:
    base = pipeline(models / "tiny-sd")
    pipe = kind(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(models / "tiny-sd", name, [seed])
    made = pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **settings).images[0]
    return np.asarray((made * 255).round(), dtype=np.uint8)


def pixels(generation: Any) -> np.ndarray:
    return np.asarray(generation.images[0].to_pil())


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_equals_the_pipeline(client: Client, models: Path, name: str, strength: float) -> None:
    ours = client.generate(PROMPT, scheduler=name, steps=10, guidance=5, seed=4, image=a_picture(), strength=strength)
    theirs = reference(
        models, diffusers.StableDiffusionImg2ImgPipeline, name, 4,
        image=a_picture(), strength=strength, num_inference_steps=10, guidance_scale=5,
    )  # fmt: skip
    assert worst(pixels(ours), theirs) <= 1


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_inpainting_equals_the_pipeline(client: Client, models: Path, name: str, strength: float) -> None:
    ours = client.generate(
        PROMPT, scheduler=name, steps=10, guidance=5, seed=4, image=a_picture(), mask=a_mask(), strength=strength
    )
    theirs = reference(
        models, diffusers.StableDiffusionInpaintPipeline, name, 4,
        image=a_picture(), mask_image=a_mask(), strength=strength, width=64, height=64,
        num_inference_steps=10, guidance_scale=5,
    )  # fmt: skip
    assert worst(pixels(ours), theirs) <= 1


def test_strength_is_0_8_and_1_with_a_mask_as_in_diffusers(client: Client, models: Path) -> None:
    common = {"num_inference_steps": 6, "guidance_scale": 4, "image": a_picture()}
    ours = client.generate(PROMPT, steps=6, guidance=4, seed=1, scheduler="DDIM", image=a_picture())
    theirs = reference(models, diffusers.StableDiffusionImg2ImgPipeline, "DDIM", 1, **common)
    assert worst(pixels(ours), theirs) <= 1
    ours = client.generate(PROMPT, steps=6, guidance=4, seed=1, scheduler="DDIM", image=a_picture(), mask=a_mask())
    theirs = reference(
        models, diffusers.StableDiffusionInpaintPipeline, "DDIM", 1, mask_image=a_mask(), width=64, height=64, **common
    )
    assert worst(pixels(ours), theirs) <= 1


def test_each_of_several_pictures_is_the_one_its_seed_gives_alone(client: Client) -> None:
    options: dict[str, Any] = {"steps": 6, "scheduler": "Euler a", "image": a_picture(), "mask": a_mask()}
    together = client.generate(PROMPT, seed=4, n=3, **options)
    for i, image in enumerate(together.images):
        alone = client.generate(PROMPT, seed=4 + i, **options)
        assert worst(np.asarray(image.to_pil()), pixels(alone)) <= 1


async def test_modes_share_steps_and_none_shows_in_another(mesh: Any) -> None:
    requests: list[dict[str, Any]] = [
        {"seed": 1, "scheduler": "Euler", "steps": 8},
        {"seed": 2, "scheduler": "Euler a", "steps": 12, "image": a_picture(), "strength": 0.5},
        {"seed": 3, "scheduler": "DPM++ 2M", "steps": 9, "image": a_picture(), "mask": a_mask()},
        {"seed": 4, "scheduler": "Heun", "steps": 7, "image": a_picture(), "mask": a_mask(), "strength": 0.7},
    ]
    async with AsyncClient(mesh.grpc_address) as client:
        together = await asyncio.gather(*(client.generate(PROMPT, **one) for one in requests))
        for one, made in zip(requests, together, strict=True):
            assert worst(pixels(made), pixels(await client.generate(PROMPT, **one))) <= 1


def test_pictures_of_another_size_are_resized(client: Client) -> None:
    small = client.generate(PROMPT, steps=4, seed=1, image=a_picture(), mask=a_mask(), width=64, height=64)
    assert pixels(small).shape == (64, 64, 3)
    wide = client.generate(PROMPT, steps=4, seed=1, image=a_picture((200, 100)), mask=a_mask((50, 90)), width=128)
    assert pixels(wide).shape == (64, 128, 3)


def test_what_is_kept_is_the_original_to_the_pixel(client: Client) -> None:
    made = pixels(client.generate(PROMPT, steps=4, seed=1, image=a_picture(), mask=a_mask(), keep_unmasked=True))
    kept = np.asarray(a_mask().convert("L")) < 128
    np.testing.assert_array_equal(made[kept], np.asarray(a_picture())[kept])
    assert worst(made[~kept], np.asarray(a_picture())[~kept]) > 10


def test_an_inverted_mask_redraws_the_rest(client: Client) -> None:
    options: dict[str, Any] = {"steps": 4, "seed": 1, "image": a_picture(), "keep_unmasked": True}
    made = pixels(client.generate(PROMPT, mask=a_mask(), invert_mask=True, **options))
    kept = np.asarray(a_mask().convert("L")) >= 128
    np.testing.assert_array_equal(made[kept], np.asarray(a_picture())[kept])


def test_a_blurred_mask_has_a_soft_edge(client: Client) -> None:
    options: dict[str, Any] = {"steps": 4, "seed": 1, "image": a_picture(), "mask": a_mask(), "keep_unmasked": True}
    hard, soft = (pixels(client.generate(PROMPT, mask_blur=blur, **options)) for blur in (0, 3))
    edge = np.s_[12:20, 12:20]  # around the mask's upper left corner
    assert worst(soft[edge], hard[edge]) > 0
    np.testing.assert_array_equal(soft[:2], np.asarray(a_picture())[:2])  # far from it


def test_the_steps_told_of_are_those_done(client: Client) -> None:
    told: list[tuple[int, int]] = []
    client.generate(
        PROMPT, steps=10, seed=1, scheduler="DDIM", image=a_picture(), strength=0.45,
        on_progress=lambda progress: told.append((progress.step, progress.steps)),
    )  # fmt: skip
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a mask without a picture": ({"mask": b"x"}, "image must be a picture, since mask is given"),
    "a strength without a picture": ({"strength": 0.5}, "image must be a picture, since strength is given"),
    "a strength of nothing": ({"image": a_picture(), "strength": 0.0}, "strength must be above 0"),
    "a strength above one": ({"image": a_picture(), "strength": 1.5}, "strength must be above 0"),
    "no number": ({"image": a_picture(), "strength": float("nan")}, "strength must be above 0"),
    "too little for a step": ({"image": a_picture(), "strength": 0.1}, "strength must be at least 0.25"),
    "a picture that is none": ({"image": b"not a picture"}, "image.encoded"),
    "a mask that is none": ({"image": a_picture(), "mask": b"not a picture"}, "mask.encoded"),
    "a dark mask": ({"image": a_picture(), "mask": Image.new("RGB", (64, 64))}, "mask must be bright"),
    "too much blur": ({"image": a_picture(), "mask": a_mask(), "mask_blur": 5000}, "mask_blur must be 0 to 256"),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_input_is_named(client: Client, how: str) -> None:
    options, message = WRONG[how]
    with pytest.raises(MeshError, match=message) as caught:
        client.generate(PROMPT, steps=4, **options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_scheduler_that_cannot_begin_with_a_picture_is_named(client: Client) -> None:
    with pytest.raises(MeshError, match="scheduler must be one that can begin with a picture") as caught:
        client.generate(PROMPT, steps=4, scheduler="IPNDM", image=a_picture())
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
