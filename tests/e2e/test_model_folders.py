"""One folder that is broken, or that this mesh can't run, takes nothing else down."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from imagemesh_client import Client
from imagemesh_runtime.errors import MeshError
from tests.support.mesh import running_mesh


def change(path: Path, **values: object) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SPOILED: dict[str, Callable[[Path], object]] = {
    "without its parts": lambda folder: [shutil.rmtree(part) for part in folder.iterdir() if part.is_dir()],
    "a UNet with image embeddings": lambda folder: change(folder / "unet" / "config.json", addition_embed_type="image"),
    "a UNet that edits pictures": lambda folder: change(folder / "unet" / "config.json", in_channels=8),
    "a consistency UNet": lambda folder: change(folder / "unet" / "config.json", time_cond_proj_dim=256),
    "a sample size of three": lambda folder: change(folder / "unet" / "config.json", sample_size=[8, 8, 8]),
    "a config that is none": lambda folder: (folder / "unet" / "config.json").write_text("{"),
    "defaults that are none": lambda folder: (folder / "imagemesh.json").write_text('{"steps": "many"}'),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_folder_is_left_out_and_the_others_serve(models: Path, tmp_path: Path, how: str) -> None:
    for name in ("good", "spoiled"):
        shutil.copytree(models / "tiny-sd", tmp_path / name)
    SPOILED[how](tmp_path / "spoiled")
    with running_mesh(backend="torch", models=str(tmp_path)) as mesh, Client(mesh.grpc_address) as client:
        listed = client.models()
        assert listed.unreachable == ()
        assert [model.name for model in listed if model.role == "diffusion"] == ["good"]
        assert client.generate("a cat", steps=2).parameters.model == "good"
        with pytest.raises(MeshError, match="model 'spoiled' not found; available: good") as caught:
            client.generate("a cat", steps=2, model="spoiled")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_services_without_any_model_say_so_and_where_they_looked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_mesh(backend="torch", models=str(tmp_path)) as mesh, Client(mesh.grpc_address) as client:
        listed = client.models()
        with pytest.raises(MeshError) as caught:
            client.generate("a cat", steps=2)
    assert (len(listed), listed.unreachable, listed.roots) == (0, (), (str(tmp_path),))
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert str(caught.value) == f"diffusion has no model to serve; it looked in {tmp_path}"
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    roles = ["controlnet", "diffusion", "text-encoder", "vae", "vit"]
    assert sorted(text.split(" ")[0] for text in warned) == roles
    assert all(f"it looked in {tmp_path}, which holds no model folder" in text for text in warned)


def test_only_services_that_have_no_model_warn(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(models / "tiny-sd", tmp_path / "painter")
    with running_mesh(backend="torch", models=str(tmp_path)), running_mesh(backend="fake"):
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(text.split(" ")[0] for text in warned) == ["controlnet", "vit"]
    assert all("painter (StableDiffusionPipeline), and runs none of these" in text for text in warned)
