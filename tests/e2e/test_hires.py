"""A second pass at a higher resolution: as diffusers' two pipelines one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from imagemesh_client import Client, Hires
from imagemesh_runtime.errors import MeshError
from tests.support.mesh import running_mesh
from tests.support.reference import draw, pipeline, scheduler, worst

PROMPT = "a red fox on the water"


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def pixels(generation: Any) -> np.ndarray:
    return np.asarray(generation.images[0].to_pil())


def second_pass(models: Path, name: str, seed: int, image: Any, **settings: Any) -> np.ndarray:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **pipeline(models / "tiny-sd").components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(models / "tiny-sd", name, [seed])
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(PROMPT, image=image, generator=generator, output_type="np", guidance_scale=4, **settings).images[0]
    return np.asarray((made * 255).round(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("upscaler", "mode"),
    [("", "bilinear"), ("Latent (nearest)", "nearest"), ("Latent (nearest-exact)", "nearest-exact"),
     ("Latent (bicubic)", "bicubic")],
)  # fmt: skip
def test_latents_are_enlarged_and_made_anew_in_part(client: Client, models: Path, upscaler: str, mode: str) -> None:
    hires = Hires(scale=1.5, upscaler=upscaler, steps=8, strength=0.6)
    ours = client.generate(PROMPT, steps=5, guidance=4, seed=3, scheduler="Euler a", hires=hires)
    pipe = pipeline(models / "tiny-sd")
    before, pipe.scheduler = pipe.scheduler, scheduler(models / "tiny-sd", "Euler a", [3])
    generator = torch.Generator("cpu").manual_seed(3)
    latents = pipe(PROMPT, num_inference_steps=5, guidance_scale=4, generator=generator, output_type="latent").images
    pipe.scheduler = before
    larger = functional.interpolate(latents, size=(12, 12), mode=mode)
    theirs = second_pass(models, "Euler a", 3, larger, strength=0.6, num_inference_steps=8)
    assert pixels(ours).shape == (96, 96, 3)
    assert worst(pixels(ours), theirs) <= 1


def test_pictures_are_enlarged_and_made_anew_in_part(client: Client, models: Path) -> None:
    hires = Hires(size=(128, 96), upscaler="Lanczos", strength=0.5)
    ours = client.generate(PROMPT, steps=6, guidance=4, seed=3, scheduler="DDIM", hires=hires)
    first = draw(models / "tiny-sd", PROMPT, scheduler_name="DDIM", seeds=[3], num_inference_steps=6, guidance_scale=4)
    larger = Image.fromarray(first[0]).resize((128, 96), Image.Resampling.LANCZOS)
    theirs = second_pass(models, "DDIM", 3, larger, strength=0.5, num_inference_steps=6)
    assert worst(pixels(ours), theirs) <= 1
    assert (ours.parameters.width, ours.parameters.height) == (128, 96)


def test_each_of_several_pictures_is_the_one_its_seed_gives_alone(client: Client) -> None:
    for upscaler in ("Latent", "Lanczos"):
        options: dict[str, Any] = {"steps": 4, "scheduler": "Euler a", "hires": Hires(scale=2, upscaler=upscaler)}
        together = client.generate(PROMPT, seed=4, n=2, **options)
        for i, image in enumerate(together.images):
            assert worst(np.asarray(image.to_pil()), pixels(client.generate(PROMPT, seed=4 + i, **options))) <= 1


def test_progress_counts_both_passes_and_the_file_tells_of_them(client: Client) -> None:
    told: list[tuple[int, int]] = []
    made = client.generate(
        PROMPT, steps=3, seed=1, scheduler="DDIM", hires=Hires(scale=2, steps=4, strength=0.5),
        on_progress=lambda progress: told.append((progress.step, progress.steps)),
    )  # fmt: skip
    assert told == [(step, 5) for step in range(1, 6)]
    written = made.images[0].to_pil().info["parameters"]
    assert "Hires resize: 128x128, Hires steps: 4, Hires upscaler: Latent, Denoising strength: 0.5" in written
    assert [timing.stage for timing in made.timings] == ["text-encoder", "diffusion", "diffusion-hires", "vae"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"hires": Hires()}, "hires.scale must be above 1, and at most 8, or else hires.width"),
    "smaller": ({"hires": Hires(scale=1.0)}, "hires.scale must be above 1, and at most 8"),
    "far larger": ({"hires": Hires(scale=9.0)}, "hires.scale must be above 1, and at most 8"),
    "no number": ({"hires": Hires(scale=float("nan"))}, "hires.scale must be above 1"),
    "twice": ({"hires": Hires(scale=2, size=(128, 128))}, "hires.scale must be absent"),
    "odd": ({"hires": Hires(size=(100, 128))}, "hires.width must be"),
    "unknown": ({"hires": Hires(scale=2, upscaler="ESRGAN")}, "hires.upscaler must be Latent, .*Nearest, got"),
    "no step": ({"hires": Hires(scale=2, steps=2, strength=0.1)}, "hires.strength must be at least 0.5"),
    "too many": ({"hires": Hires(scale=2, steps=5000)}, "hires.steps must be 1 to"),
    "a picture": ({"hires": Hires(scale=2), "image": Image.new("RGB", (64, 64))}, "hires must be absent"),
    "too large": ({"hires": Hires(size=(4096, 4096)), "n": 16}, "hires"),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_input_is_named(client: Client, how: str) -> None:
    options, message = WRONG[how]
    with pytest.raises(MeshError, match=message) as caught:
        client.generate(PROMPT, steps=4, **options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
