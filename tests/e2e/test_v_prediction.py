"""A model that predicts velocities, as Stable Diffusion 2 does, draws through the mesh what diffusers draws of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagemesh_client import Client
from tests.support import tiny_sdxl
from tests.support.mesh import running_mesh
from tests.support.reference import draw, worst

SETTINGS = {"steps": 6, "guidance": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model told to be one, whose tokenizer pads with "!" as theirs do; and as it is."""
    root = tmp_path_factory.mktemp("velocities")
    for name in ("tiny-sd", "tiny-v"):
        shutil.copytree(models / "tiny-sd", root / name)
    config = root / "tiny-v" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    tiny_sdxl._second_tokenizer(root / "tiny-v" / "tokenizer")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def picture(client: Client, **options: object) -> Image.Image:
    made = client.generate("a red fox", **{"model": "tiny-v", **SETTINGS, **options})  # type: ignore[arg-type]
    return made.images[0].to_pil()


def theirs(folder: Path, **more: object) -> np.ndarray:
    common = {"num_inference_steps": SETTINGS["steps"], "guidance_scale": SETTINGS["guidance"], "seeds": [5]}
    drawn: np.ndarray = draw(folder / "tiny-v", "a red fox", **common, **more)[0]  # type: ignore[arg-type]
    return drawn


@pytest.mark.parametrize(
    "scheduler", ["", "DDIM", "Euler a", "Heun", "LMS", "DPM++ 2M Karras", "DPM++ SDE", "UniPC", "SA Solver", "LCM"]
)
def test_every_solver_takes_velocities(client: Client, folder: Path, scheduler: str) -> None:
    assert worst(picture(client, scheduler=scheduler), theirs(folder, scheduler_name=scheduler)) <= 1


def test_a_schedule_that_ends_in_noise_alone_with_guidance_rescaled(client: Client, folder: Path) -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ours = picture(client, scheduler="DDIM", scheduler_options=options, guider_options={"guidance_rescale": 0.7})
    wanted = theirs(folder, scheduler_name="DDIM", scheduler_options=options, guidance_rescale=0.7)
    assert worst(ours, wanted) <= 1


def test_it_is_another_picture_than_of_noise_predictions(client: Client) -> None:
    assert worst(picture(client), picture(client, model="tiny-sd")) > 3
