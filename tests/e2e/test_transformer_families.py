"""The transformer families in one mesh: beside one another, previewed, and what they are not for."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from imagemesh_client import AsyncClient, Client, Control, Hires, Progress
from imagemesh_runtime.errors import MeshError
from tests.support import tiny_transformers
from tests.support.families import PROMPT, a_picture, made
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_models import build_models

MODELS = {
    "tiny-sd3": tiny_transformers.build_sd3,
    "tiny-flux": tiny_transformers.build_flux,
    "tiny-qwen-image": tiny_transformers.build_qwen_image,
    "tiny-z-image": tiny_transformers.build_z_image,
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root: Path = build_models(tmp_path_factory.mktemp("families"))
    for name, build in MODELS.items():
        build(root / name)
    with running_mesh(models=str(root), backend="torch") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def client(mesh: Any) -> Iterator[Client]:
    with Client(mesh.grpc_address) as client:
        yield client


async def test_a_crowd_of_all_families_changes_nothing(mesh: Any) -> None:
    common = {"width": 64, "height": 64}
    requests: list[dict[str, Any]] = [
        {"model": "tiny-sd", "seed": 1, "steps": 3},
        *({"model": model, "seed": 2, "steps": 3, "guidance": 1.0, **common} for model in MODELS),
        *({"model": model, "seed": 3, "steps": 5, "scheduler": "Euler a", "n": 2, **common} for model in MODELS),
        *({"model": model, "seed": 4, "image": a_picture(), "strength": 0.6, "steps": 4, **common} for model in MODELS),
    ]
    async with AsyncClient(mesh.grpc_address) as client:
        together = await asyncio.gather(*(client.generate(PROMPT, **one) for one in requests))
        for one, beside in zip(requests, together, strict=True):
            alone = await client.generate(PROMPT, **one)
            for mine, other in zip(beside.images, alone.images, strict=True):
                assert worst(mine.to_pil(), other.to_pil()) <= 1


@pytest.mark.parametrize("model", MODELS)
def test_previews_and_progress(client: Client, model: str) -> None:
    options: dict[str, Any] = {"image": a_picture(), "strength": 0.7, "steps": 5, "width": 64, "height": 64}
    told = [one for one in client.stream(PROMPT, model=model, preview_every=1, **options) if isinstance(one, Progress)]
    assert [(one.step, one.steps) for one in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(one.previews) for one in told] == [1, 1, 1, 0]
    assert all(one.previews[0].startswith(b"\xff\xd8") for one in told[:3])


@pytest.mark.parametrize("model", MODELS)
def test_a_second_pass_makes_it_larger(client: Client, model: str) -> None:
    large = made(client, model, hires=Hires(scale=1.5, strength=0.5), steps=3)
    assert large.shape == (1, 96, 96, 3)
    assert large.std() > 5


@pytest.mark.parametrize("model", MODELS)
def test_what_the_families_are_not_for_is_refused_by_name(client: Client, model: str) -> None:
    mask = Image.fromarray(np.full((64, 64), 255, np.uint8))
    with pytest.raises(MeshError, match="inputs must be a map without it") as caught:
        made(client, model, image=a_picture(), mask=mask)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(MeshError, match="ControlNets don't steer its family here") as caught:
        made(client, model, controls=[Control(a_picture(), "tiny-controlnet")])
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_cards_tell_the_family_and_what_suits_it(client: Client) -> None:
    told = {model.name: model.properties for model in client.models() if model.role == "diffusion"}
    assert {name: told[name]["family"] for name in MODELS} == {name: name.removeprefix("tiny-") for name in MODELS}
    assert told["tiny-flux"]["guidance_scale"] == "3.5"
    assert told["tiny-qwen-image"]["multiple"] == "16"
