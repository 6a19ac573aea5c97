"""One process, whose services talk over Unix sockets, and six, which talk over TCP, draw the same picture."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagemesh_client import Client, Control
from tests.support.mesh import running_mesh
from tests.support.processes import Process, six_processes
from tests.support.reference import draw, worst

REQUEST = {"scheduler": "Euler a", "steps": 6, "seed": 21, "guidance": 5.0}
PROMPT = "the red cat"


@pytest.fixture(scope="module")
def processes(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    with six_processes(models, tmp_path_factory.mktemp("s"), IMAGEMESH_BACKEND="torch") as found:
        yield found


def picture(client: Client, **options: object) -> np.ndarray:
    return np.asarray(client.generate(PROMPT, **REQUEST, **options).images[0].to_pil())  # type: ignore[arg-type]


def test_six_processes_and_one_draw_the_pipelines_picture(
    processes: dict[str, Process], models: Path, control_image: Image.Image
) -> None:
    control = [Control(control_image)]
    with Client(processes["gateway"].address) as client:
        apart, steered = picture(client), picture(client, controls=control)
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        together, steered_together = picture(client), picture(client, controls=control)
    theirs = draw(
        models / "tiny-sd", PROMPT, scheduler_name="Euler a", seeds=[21], num_inference_steps=6, guidance_scale=5
    )
    assert worst(apart, together) == 0
    assert worst(steered, steered_together) == 0
    assert worst(apart, theirs[0]) <= 1


def test_six_processes_classify_and_embed(processes: dict[str, Process], control_image: Image.Image) -> None:
    with Client(processes["gateway"].address) as client:
        (seen,) = client.classify(control_image, top_k=3)
        embeddings = client.embed(control_image, normalize=True)
    assert seen.model == "tiny-vit"
    assert len(seen.predictions) == 3
    assert np.linalg.norm(embeddings.vectors, axis=1) == pytest.approx([1.0], abs=1e-5)


def test_the_models_of_all_services_are_listed(processes: dict[str, Process]) -> None:
    with Client(processes["gateway"].address) as client:
        models = client.models()
    assert models.unreachable == ()
    assert {(model.role, model.name) for model in models} == {
        ("text-encoder", "tiny-sd"),
        ("diffusion", "tiny-sd"),
        ("vae", "tiny-sd"),
        ("controlnet", "tiny-controlnet"),
        ("vit", "tiny-vit"),
    }
