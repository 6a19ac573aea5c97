"""Stable Diffusion 3 through the mesh draws what diffusers' own pipeline draws."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemesh_client import Client
from tests.support import tiny_transformers
from tests.support.families import NEGATIVE, a_picture, made, reference
from tests.support.mesh import running_mesh
from tests.support.reference import worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sd3")
    tiny_transformers.build_sd3(root / "tiny-sd3")
    tiny_transformers.build_sd3(root / "tiny-sd3-without-t5", t5=False)
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-sd3-without-t5"])
def test_text_to_image(client: Client, folder: Path, model: str) -> None:
    theirs = reference(folder / model, [3, 4], negative_prompt=NEGATIVE)
    assert worst(made(client, model, negative_prompt=NEGATIVE, n=2), theirs) <= 1


@pytest.mark.parametrize("guidance", [4, 1])
def test_without_a_negative_prompt_and_without_guidance(client: Client, folder: Path, guidance: int) -> None:
    theirs = reference(folder / "tiny-sd3", [3], width=96, guidance_scale=guidance)
    assert worst(made(client, "tiny-sd3", width=96, guidance=guidance), theirs) <= 1


def test_clip_skip(client: Client, folder: Path) -> None:
    theirs = reference(folder / "tiny-sd3", [3], clip_skip=1)
    skipped = made(client, "tiny-sd3", clip_skip=1)
    assert worst(skipped, theirs) <= 1
    assert worst(skipped, made(client, "tiny-sd3")) > 1


@pytest.mark.parametrize("scheduler", ["Heun", "Euler a", "UniPC", "DPM++ 2M", "LCM", "SA Solver"])
def test_schedulers(client: Client, folder: Path, scheduler: str) -> None:
    theirs = reference(folder / "tiny-sd3", [3], scheduler=scheduler)
    assert worst(made(client, "tiny-sd3", scheduler=scheduler), theirs) <= 1


@pytest.mark.parametrize("scheduler", ["Euler", "DPM++ 2M"])
def test_a_flow_shift(client: Client, folder: Path, scheduler: str) -> None:
    theirs = reference(folder / "tiny-sd3", [3], scheduler=f"{scheduler}, 7")
    shifted = made(client, "tiny-sd3", scheduler=scheduler, scheduler_options={"flow_shift": 7})
    assert worst(shifted, theirs) <= 1
    assert worst(shifted, made(client, "tiny-sd3", scheduler=scheduler)) > 1


def test_image_to_image(client: Client, folder: Path) -> None:
    common = {"image": a_picture(), "strength": 0.7, "negative_prompt": NEGATIVE}
    kind = "StableDiffusion3Img2ImgPipeline"
    theirs = reference(folder / "tiny-sd3", [3], kind=kind, **common)
    assert worst(made(client, "tiny-sd3", **common), theirs) <= 1
    both = made(client, "tiny-sd3", n=2, **common)
    assert worst(both[0], theirs[0]) <= 1
    assert worst(both[1], reference(folder / "tiny-sd3", [4], kind=kind, **common)[0]) <= 1
