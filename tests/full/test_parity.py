"""Every scheduler in every mode draws what diffusers' own pipeline draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from imagemesh_client import Client, Control
from imagemesh_services.diffusion.schedulers import SCHEDULERS
from tests.support.mesh import running_mesh
from tests.support.reference import draw, pipeline, scheduler, worst

PROMPT, SEED, STEPS, GUIDANCE = "a red fox on the water", 4, 8, 3.0
MODES = ("text to image", "image to image", "inpainting", "ControlNet")
# diffusers' IPNDM can't begin with a picture.
CASES = [
    (name, mode)
    for name in sorted(SCHEDULERS)
    for mode in MODES
    if name != "IPNDM" or mode in ("text to image", "ControlNet")
]


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


@pytest.fixture(scope="module")
def farthest() -> dict[str, list[int]]:
    return {mode: [] for mode in MODES}


def a_picture() -> Image.Image:
    numbers = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(numbers).resize((64, 64), Image.Resampling.BICUBIC)


def a_mask() -> Image.Image:
    mask = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(mask).rectangle((16, 16, 55, 32), fill="white")
    return mask


def settings_of(mode: str) -> dict[str, Any]:
    """The client's options for a mode."""
    if mode == "image to image":
        return {"image": a_picture(), "strength": 0.7}
    if mode == "inpainting":
        return {"image": a_picture(), "mask": a_mask(), "strength": 0.8}
    return {}


def the_pipelines(models: Path, name: str, mode: str, control_image: Image.Image) -> np.ndarray:
    """The picture, uint8 [height, width, 3]."""
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    if mode in ("text to image", "ControlNet"):
        more: dict[str, Any] = {}
        if mode == "ControlNet":
            more = {"controlnet": models / "tiny-controlnet", "control_image": control_image}
        drawn: np.ndarray = draw(models / "tiny-sd", PROMPT, scheduler_name=name, seeds=[SEED], **common, **more)[0]
        return drawn
    more = {"image": a_picture(), "strength": settings_of(mode)["strength"]}
    kind = diffusers.StableDiffusionImg2ImgPipeline
    if mode == "inpainting":
        kind = diffusers.StableDiffusionInpaintPipeline
        more |= {"mask_image": a_mask(), "width": 64, "height": 64}
    pipe = kind(**pipeline(models / "tiny-sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(models / "tiny-sd", name, [SEED])
    generator = torch.Generator("cpu").manual_seed(SEED)
    made = pipe(PROMPT, generator=generator, output_type="np", **common, **more).images[0]
    return np.asarray((made * 255).round(), dtype=np.uint8)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_the_picture_is_the_pipelines(
    client: Client, models: Path, control_image: Image.Image, name: str, mode: str,
    farthest: dict[str, list[int]], figures: dict[str, str],
) -> None:  # fmt: skip
    options = settings_of(mode)
    if mode == "ControlNet":
        options = {"controls": [Control(control_image, model="tiny-controlnet")]}
    made = client.generate(PROMPT, scheduler=name, seed=SEED, steps=STEPS, guidance=GUIDANCE, **options)
    far = worst(np.asarray(made.images[0].to_pil()), the_pipelines(models, name, mode, control_image))
    farthest[mode].append(far)
    found = farthest[mode]
    figures[mode] = f"{len(found)} schedulers, {found.count(0)} of them equal to the bit, the farthest {max(found)}/255"
    assert far <= 1
