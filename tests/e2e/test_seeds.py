"""A seed a picture, and pictures much like another's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from imagemesh_client import Client
from imagemesh_runtime.errors import MeshError
from imagemesh_services.diffusion.backends.torch.start import slerp
from tests.support.mesh import running_mesh
from tests.support.reference import draw, worst

PROMPT = "a red fox on the water"
COMMON: dict[str, Any] = {"steps": 5, "guidance": 5, "scheduler": "Euler a"}


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def pictures(client: Client, **options: Any) -> list[np.ndarray]:
    return [np.asarray(image.to_pil()) for image in client.generate(PROMPT, **COMMON, **options).images]


def test_every_picture_takes_its_own_seed(client: Client, models: Path) -> None:
    made = pictures(client, seeds=[40, 7, 12])
    for picture, seed in zip(made, (40, 7, 12), strict=True):
        theirs = draw(models / "tiny-sd", PROMPT, scheduler_name="Euler a", seeds=[seed], num_inference_steps=5,
                      guidance_scale=5)  # fmt: skip
        assert worst(picture, theirs[0]) <= 1


def test_a_variation_is_the_pipeline_on_slerped_noise(client: Client, models: Path) -> None:
    (made,) = pictures(client, seed=7, variation_seed=8, variation_strength=0.3)
    first, second = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8))
    a, b = first.flatten().double(), second.flatten().double()
    angle = torch.acos(a @ b / a.norm() / b.norm())
    mixed = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    generator = torch.Generator().manual_seed(7)
    torch.randn(1, 4, 8, 8, generator=generator)  # the ancestral steps go on where the noise ended
    theirs = draw(
        models / "tiny-sd", PROMPT, scheduler_name="Euler a", seeds=[7], num_inference_steps=5, guidance_scale=5,
        latents=mixed.float().reshape(1, 4, 8, 8), generator_state=generator.get_state(),
    )  # fmt: skip
    assert worst(made, theirs[0]) <= 1


def test_the_further_it_is_turned_the_less_it_is_alike(client: Client) -> None:
    ((plain,), *varied) = [
        pictures(client, seed=7, **({"variation_seed": 8, "variation_strength": much} if much else {}))
        for much in (0, 0.05, 0.6)
    ]
    little, much = (float(np.abs(one[0].astype(int) - plain).mean()) for one in varied)
    assert 0 < little < much


def test_each_picture_has_a_variation_of_its_own(client: Client) -> None:
    together = pictures(client, seed=7, n=2, variation_seed=20, variation_strength=0.4)
    alone = pictures(client, seed=8, variation_seed=21, variation_strength=0.4)
    assert worst(together[1], alone[0]) <= 1


def test_a_variation_of_a_picture_to_start_from_works_too(client: Client) -> None:
    image = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 60).convert("RGB")
    plain = pictures(client, seed=7, image=image)
    assert worst(pictures(client, seed=7, image=image, variation_seed=3, variation_strength=0.5), plain) > 1


def test_what_was_drawn_is_told(client: Client) -> None:
    generation = client.generate(PROMPT, **COMMON, seed=7, variation_strength=0.25)
    text = generation.images[0].to_pil().info["parameters"]
    assert "Variation seed: " in text
    assert "Variation seed strength: 0.25" in text


def test_slerp_keeps_the_length_and_ends_where_it_should() -> None:
    a, b = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert abs(float(slerp(a, b, 0.5).norm() / a.norm()) - 1) < 0.1
    torch.testing.assert_close(slerp(a, a, 0.5), a)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "seeds and a seed": ({"seeds": [1], "seed": 2}, "seed must be absent where seeds are given"),
    "seeds and a count": ({"seeds": [1, 2], "n": 2}, "num_images must be absent"),
    "too many": ({"seeds": list(range(65))}, "seeds must be 1 to 64"),
    "too far": ({"variation_strength": 1.5}, "variation_strength must be 0 to 1"),
    "a seed without strength": ({"variation_seed": 3}, "variation_strength must be above 0"),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_input_is_named(client: Client, how: str) -> None:
    options, message = WRONG[how]
    with pytest.raises(MeshError, match=message) as caught:
        client.generate(PROMPT, **COMMON, **options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_misspelt_option_is_no_option(client: Client) -> None:
    with pytest.raises(TypeError, match="takes no option variatoin_seed"):
        client.generate(PROMPT, variatoin_seed=3)  # type: ignore[call-arg]
