"""The mesh draws with the shipped folders what diffusers draws with them."""

from collections.abc import Iterator

import numpy as np
import pytest

import imagemesh_models
from imagemesh_client import Client
from tests.support.mesh import running_mesh
from tests.support.reference import draw, worst

ROOT = imagemesh_models.root()
PROMPT = "a red apple on a blue background"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running_mesh(models=str(ROOT), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


@pytest.mark.parametrize("scheduler", ["", "DDIM", "Euler a"])
def test_the_picture_equals_the_pipeline_s(client: Client, scheduler: str) -> None:
    generation = client.generate(PROMPT, negative_prompt="a fox", scheduler=scheduler, steps=8, guidance=3, seed=7)
    theirs = draw(
        ROOT / "emoji-sd", PROMPT, negative_prompt="a fox", scheduler_name=scheduler, seeds=[7], num_inference_steps=8,
        guidance_scale=3,
    )  # fmt: skip
    assert worst([np.asarray(image.to_pil()) for image in generation.images], theirs) <= 1
