"""Models made for inpainting (9 channels), and redrawing only the masked part: as diffusers' pipeline does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from imagemesh_client import Client
from imagemesh_gateway.sources import crop_box
from imagemesh_runtime.errors import MeshError
from tests.support.mesh import running_mesh
from tests.support.reference import scheduler, worst
from tests.support.tiny_models import build_inpainting, build_stable_diffusion

PROMPT = "a red fox on the water"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inpainting")
    build_stable_diffusion(root / "tiny-sd")
    build_inpainting(root / "tiny-inpainting", root / "tiny-sd")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def a_picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    numbers = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(numbers).resize(size, Image.Resampling.BICUBIC)


def a_mask(size: tuple[int, int] = (64, 64), box: tuple[int, int, int, int] = (16, 16, 55, 32)) -> Image.Image:
    mask = Image.new("RGB", size, "black")
    ImageDraw.Draw(mask).rectangle(box, fill="white")
    return mask


def reference(folder: Path, name: str, seed: int, **settings: Any) -> np.ndarray:
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(folder, name, [seed])
    settings = {"num_inference_steps": 6, "guidance_scale": 4, "width": 64, "height": 64, **settings}
    return np.asarray(pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(seed), **settings).images[0])


def pixels(generation: Any) -> np.ndarray:
    return np.asarray(generation.images[0].to_pil())


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["DDIM", "Euler a", "DPM++ 2M Karras", "PNDM"])
def test_a_model_of_nine_channels_equals_the_pipeline(client: Client, folder: Path, name: str, strength: float) -> None:
    ours = client.generate(
        PROMPT, model="tiny-inpainting", scheduler=name, steps=6, guidance=4, seed=4, image=a_picture(), mask=a_mask(),
        strength=strength,
    )  # fmt: skip
    theirs = reference(folder / "tiny-inpainting", name, 4, image=a_picture(), mask_image=a_mask(), strength=strength)
    assert worst(pixels(ours), theirs) <= 1


def test_it_needs_a_mask_and_says_so(client: Client) -> None:
    for options in ({}, {"image": a_picture()}):
        with pytest.raises(MeshError, match="mask must be a picture: tiny-inpainting is made for inpainting") as caught:
            client.generate(PROMPT, model="tiny-inpainting", steps=2, **options)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (listed,) = [one for one in client.models() if one.name == "tiny-inpainting" and one.role == "diffusion"]
    assert listed.properties["needs"] == "mask"


def test_several_pictures_are_those_of_their_seeds_alone(client: Client) -> None:
    options: dict[str, Any] = {"model": "tiny-inpainting", "steps": 4, "image": a_picture(), "mask": a_mask()}
    together = client.generate(PROMPT, seed=4, n=2, scheduler="Euler a", strength=0.7, **options)
    for i, image in enumerate(together.images):
        alone = client.generate(PROMPT, seed=4 + i, scheduler="Euler a", strength=0.7, **options)
        assert worst(np.asarray(image.to_pil()), pixels(alone)) <= 1


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-inpainting"])
@pytest.mark.parametrize(
    ("size", "box", "padding"),
    [((160, 120), (90, 40, 120, 90), 8), ((160, 120), (2, 3, 150, 10), 0), ((64, 200), (20, 150, 30, 199), 32)],
)
def test_only_the_masked_part_is_redrawn_as_by_the_pipeline(
    client: Client, folder: Path, model: str, size: tuple[int, int], box: tuple[int, int, int, int], padding: int
) -> None:
    common: dict[str, Any] = {"image": a_picture(size), "strength": 0.8}
    ours = client.generate(
        PROMPT, model=model, steps=6, guidance=4, seed=4, scheduler="DDIM", width=64, height=64,
        mask=a_mask(size, box), mask_padding=padding, **common,
    )  # fmt: skip
    theirs = reference(folder / model, "DDIM", 4, mask_image=a_mask(size, box), padding_mask_crop=padding, **common)
    assert worst(pixels(ours), theirs) <= 1
    assert (ours.parameters.width, ours.parameters.height) == size


def test_the_part_to_crop_is_diffusers() -> None:
    numbers = np.random.default_rng(1)
    for _ in range(300):
        height, width = (int(side) for side in numbers.integers(20, 200, 2))
        mask = np.zeros((height, width), np.uint8)
        (top, bottom), (left, right) = (np.sort(numbers.integers(0, side, 2)) for side in (height, width))
        mask[top : bottom + 1, left : right + 1] = 255
        asked = (*(int(side) for side in numbers.integers(8, 100, 2) * 8), int(numbers.integers(0, 40)))
        theirs = VaeImageProcessor.get_crop_region(Image.fromarray(mask), *asked[:2], asked[2])
        assert np.abs(np.subtract(crop_box(mask, *asked), theirs)).max() <= 1, (mask.shape, asked)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"image": a_picture(), "mask_padding": 3}, "mask_padding must be absent where there is no mask"),
    "no picture": ({"mask_padding": 3}, "image must be a picture, since mask_padding is given"),
    "too far": ({"image": a_picture(), "mask": a_mask(), "mask_padding": 99999}, "mask_padding must be 0 to"),
    "nothing": ({"image": a_picture(), "mask": Image.new("L", (9, 9)), "mask_padding": 1}, "mask must be bright"),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_input_is_named(client: Client, how: str) -> None:
    options, message = WRONG[how]
    with pytest.raises(MeshError, match=message) as caught:
        client.generate(PROMPT, model="tiny-sd", steps=4, **options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
