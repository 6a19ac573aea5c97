"""Flux through the mesh draws what diffusers' own pipeline draws."""

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
    root = tmp_path_factory.mktemp("flux")
    tiny_transformers.build_flux(root / "tiny-flux")
    tiny_transformers.build_flux(root / "tiny-flux-distilled", guidance_embeds=False)
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-flux-distilled"])
def test_text_to_image(client: Client, folder: Path, model: str) -> None:
    theirs = reference(folder / model, [3, 4], width=96)
    assert worst(made(client, model, width=96, n=2), theirs) <= 1


def test_guidance_is_an_input_of_the_model(client: Client, folder: Path) -> None:
    low = made(client, "tiny-flux", guidance=1.0)
    assert worst(low, reference(folder / "tiny-flux", [3], guidance_scale=1.0)) <= 1
    assert worst(low, made(client, "tiny-flux", guidance=8.0)) > 1


@pytest.mark.parametrize("scheduler", ["Euler a", "UniPC", "Euler Karras"])
def test_schedulers(client: Client, folder: Path, scheduler: str) -> None:
    theirs = reference(folder / "tiny-flux-distilled", [3], scheduler=scheduler)
    assert worst(made(client, "tiny-flux-distilled", scheduler=scheduler), theirs) <= 1


def test_a_flow_shift_takes_the_place_of_the_one_by_size(client: Client, folder: Path) -> None:
    theirs = reference(folder / "tiny-flux", [3], scheduler="Euler, 7")
    shifted = made(client, "tiny-flux", scheduler="Euler", scheduler_options={"flow_shift": 7})
    assert worst(shifted, theirs) <= 1
    assert worst(shifted, made(client, "tiny-flux")) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negative_prompt": NEGATIVE}, "negative_prompt must be empty: tiny-flux reads none"),
        ({"clip_skip": 1}, "clip_skip must be 0 to 0"),
        ({"width": 72}, "width must be a multiple of 16"),
        ({"scheduler": "Heun"}, "scheduler and steps must be ones that FlowMatchHeunDiscreteScheduler and flux can do"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(client: Client, options: dict[str, object], said: str) -> None:
    with pytest.raises(MeshError) as caught:
        made(client, "tiny-flux", **options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in str(caught.value)


def test_a_prompt_that_is_longer_than_the_family_reads_is_refused(client: Client) -> None:
    with pytest.raises(MeshError, match=r"prompt must be at most 511 tokens.*1000 tokens"):
        client.generate("x" * 999, model="tiny-flux", steps=1, width=64, height=64)


def test_image_to_image(client: Client, folder: Path) -> None:
    common = {"image": a_picture(), "strength": 0.7}
    theirs = reference(folder / "tiny-flux", [3], kind="FluxImg2ImgPipeline", **common)
    assert worst(made(client, "tiny-flux", **common), theirs) <= 1
