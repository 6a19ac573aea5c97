"""Z-Image through the mesh draws what diffusers' own pipeline draws."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from imagemesh_client import Client
from imagemesh_runtime.errors import MeshError
from tests.support import tiny_transformers
from tests.support.families import NEGATIVE, a_picture, made, reference
from tests.support.mesh import running_mesh
from tests.support.reference import worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("z-image")
    tiny_transformers.build_z_image(root / "tiny-z-image")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


@pytest.mark.parametrize("guidance", [4.0, 0.0])
def test_text_to_image(client: Client, folder: Path, guidance: float) -> None:
    wanted = reference(folder / "tiny-z-image", [3, 4], negative_prompt=NEGATIVE, width=96, guidance_scale=guidance)
    drawn = made(client, "tiny-z-image", negative_prompt=NEGATIVE, n=2, width=96, guidance=guidance)
    assert worst(drawn, wanted) <= 1


def test_an_empty_negative_prompt_guides(client: Client, folder: Path) -> None:
    assert worst(made(client, "tiny-z-image"), reference(folder / "tiny-z-image", [3])) <= 1


@pytest.mark.parametrize("scheduler", ["Euler a", "LCM"])
def test_schedulers(client: Client, folder: Path, scheduler: str) -> None:
    wanted = reference(folder / "tiny-z-image", [3], scheduler=scheduler)
    assert worst(made(client, "tiny-z-image", scheduler=scheduler), wanted) <= 1


def test_a_scheduler_that_cannot_take_its_noise_levels_is_refused_by_name(client: Client) -> None:
    with pytest.raises(MeshError, match="UniPCMultistepScheduler and z-image can do together") as caught:
        made(client, "tiny-z-image", scheduler="UniPC")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_image_to_image(client: Client, folder: Path) -> None:
    common = {"image": a_picture(), "strength": 0.7, "negative_prompt": NEGATIVE}
    wanted = reference(folder / "tiny-z-image", [3], kind="ZImageImg2ImgPipeline", **common)
    assert worst(made(client, "tiny-z-image", **common), wanted) <= 1
