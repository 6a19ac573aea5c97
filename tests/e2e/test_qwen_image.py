"""Qwen-Image through the mesh draws what diffusers' own pipeline draws."""

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
    root = tmp_path_factory.mktemp("qwen-image")
    tiny_transformers.build_qwen_image(root / "tiny-qwen-image")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def theirs(folder: Path, seeds: list[int], guidance: float = 4.0, **settings: object) -> object:
    """The pipeline calls it ``true_cfg_scale``; its ``guidance_scale`` is for distilled models."""
    return reference(folder / "tiny-qwen-image", seeds, true_cfg_scale=guidance, guidance_scale=None, **settings)


def test_text_to_image_with_prompts_of_unequal_length(client: Client, folder: Path) -> None:
    wanted = theirs(folder, [3, 4], negative_prompt=NEGATIVE, width=96)
    assert worst(made(client, "tiny-qwen-image", negative_prompt=NEGATIVE, n=2, width=96), wanted) <= 1


def test_an_empty_negative_prompt_guides_and_none_does_not(client: Client, folder: Path) -> None:
    assert worst(made(client, "tiny-qwen-image"), theirs(folder, [3], negative_prompt="")) <= 1
    assert worst(made(client, "tiny-qwen-image", guidance=1.0), theirs(folder, [3], 1.0)) <= 1


@pytest.mark.parametrize("scheduler", ["Euler a", "LCM"])
def test_schedulers(client: Client, folder: Path, scheduler: str) -> None:
    wanted = theirs(folder, [3], scheduler=scheduler, negative_prompt=NEGATIVE)
    assert worst(made(client, "tiny-qwen-image", scheduler=scheduler, negative_prompt=NEGATIVE), wanted) <= 1


def test_image_to_image(client: Client, folder: Path) -> None:
    common = {"image": a_picture(), "strength": 0.7, "negative_prompt": NEGATIVE}
    wanted = theirs(folder, [3], kind="QwenImageImg2ImgPipeline", **common)
    assert worst(made(client, "tiny-qwen-image", **common), wanted) <= 1


def test_a_guider_that_begins_with_zeros_is_refused_since_they_have_no_norm(client: Client) -> None:
    with pytest.raises(MeshError, match=r"zero_init_steps'\] must be 0 for qwen-image") as caught:
        made(client, "tiny-qwen-image", guider="CFG-Zero*")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
