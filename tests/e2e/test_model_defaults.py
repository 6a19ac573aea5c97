"""What a request leaves out is what suits the model."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler

from imagemesh_client import Client
from tests.support.mesh import running_mesh


@pytest.mark.parametrize(
    ("suits", "steps", "guidance"),
    [({"steps": 3, "guidance_scale": 2.5}, 3, 2.5), ({"steps": 4}, 4, 7.5), (None, 20, 7.5)],
)
def test_defaults_come_from_the_models_folder(
    models: Path, tmp_path: Path, suits: dict[str, float] | None, steps: int, guidance: float
) -> None:
    shutil.copytree(models / "tiny-sd", tmp_path / "mine")
    if suits is not None:
        (tmp_path / "mine" / "imagemesh.json").write_text(json.dumps(suits))
    with running_mesh(backend="torch", models=str(tmp_path)) as mesh, Client(mesh.grpc_address) as client:
        drawn = client.generate("a cat").parameters
        asked = client.generate("a cat", steps=2, guidance=1.5).parameters
    assert (drawn.steps, drawn.guidance, drawn.width, drawn.height) == (steps, guidance, 64, 64)
    assert (asked.steps, asked.guidance) == (2, 1.5)


def test_a_models_own_scheduler_goes_by_the_name_that_asks_for_it(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "tiny-sd", tmp_path / "mine")
    own = DPMSolverMultistepScheduler.from_pretrained(models / "tiny-sd" / "scheduler", use_karras_sigmas=True)
    own.save_pretrained(tmp_path / "mine" / "scheduler")
    index = tmp_path / "mine" / "model_index.json"
    scheduler = {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | scheduler))
    with running_mesh(backend="torch", models=str(tmp_path)) as mesh, Client(mesh.grpc_address) as client:
        (info,) = [model for model in client.models() if model.role == "diffusion"]
        first = client.generate("a cat", steps=4, seed=3)
        named = client.generate("a cat", steps=4, seed=3, scheduler="DPM++ 2M Karras")
    assert info.properties["scheduler"] == first.parameters.scheduler == "DPM++ 2M Karras"
    assert info.properties["scheduler_class"] == "DPMSolverMultistepScheduler"
    assert first.images[0].png == named.images[0].png
    assert "Sampler: DPM++ 2M Karras," in first.images[0].to_pil().info["parameters"]
