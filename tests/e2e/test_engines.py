"""Services of one mesh on engines of their own: the picture is torch's, to 2/255 a pixel over a whole generation."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imagemesh_models
from imagemesh_cli.main import main
from imagemesh_client import Client, Control, MeshError
from tests.support.mesh import running_mesh
from tests.support.reference import worst

PROMPT = "a red fox on the water"
# Each engine in some role, and none in all.
MIXED: Mapping[str, Mapping[str, str]] = {
    "text-encoder": {"backend": "onnxruntime"},
    "diffusion": {"backend": "torch"},
    "controlnet": {"backend": "openvino"},
    "vae": {"backend": "openvino"},
    "vit": {"backend": "torch"},
}
OTHERWISE: Mapping[str, Mapping[str, str]] = {
    "text-encoder": {"backend": "openvino"},
    "diffusion": {"backend": "openvino"},
    "controlnet": {"backend": "onnxruntime"},
    "vae": {"backend": "onnxruntime"},
    "vit": {"backend": "torch"},
}


@pytest.fixture(scope="module")
def torch_client(models: Path) -> Iterator[Client]:
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def draw(client: Client, **options: Any) -> tuple[list[np.ndarray], Mapping[str, str]]:
    made = client.generate(PROMPT, negative_prompt="blue", steps=5, guidance=6.5, seed=7, **options)
    return [np.asarray(image.to_pil()) for image in made.images], made.parameters.backends


@pytest.fixture(scope="module", params=[MIXED, OTHERWISE], ids=["mixed", "otherwise"])
def mixed(request: pytest.FixtureRequest, models: Path) -> Iterator[tuple[Client, Mapping[str, Mapping[str, str]]]]:
    with running_mesh(models=str(models), each=request.param) as mesh, Client(mesh.grpc_address) as client:
        yield client, request.param


@pytest.mark.parametrize(
    "options",
    [{"n": 2}, {"width": 104, "height": 72, "scheduler": "Euler a"}],
    ids=["two", "sides that halve to odd ones"],
)
def test_engines_mixed_freely_draw_what_torch_draws(
    torch_client: Client, mixed: Any, control_image: Image.Image, options: dict[str, Any]
) -> None:
    client, each = mixed
    control = Control(control_image, model="tiny-controlnet", scale=0.7)
    for controls in ([], [control]):
        ours, backends = draw(client, controls=controls, **options)
        theirs, _ = draw(torch_client, controls=controls, **options)
        assert worst(ours, theirs) <= 2
        told = {stage.partition("[")[0]: backend for stage, backend in backends.items()}
        roles = ["text-encoder", "diffusion", "vae", *(["controlnet"] if controls else [])]
        assert {role: told[role] for role in roles} == {role: each[role]["backend"] for role in roles}


def test_what_needs_the_layers_is_refused_by_name(mixed: Any) -> None:
    client, each = mixed
    if each["diffusion"]["backend"] == "torch":
        assert client.generate(PROMPT, steps=2, guider="PAG").images
        return
    with pytest.raises(MeshError, match="guider must be one that leaves the layers as they are"):
        client.generate(PROMPT, steps=2, guider="PAG")


def test_what_tune_found_to_be_fastest_runs_the_model_and_is_told(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "engines.toml"
    given.write_text(f'engines_file = "{tmp_path / "engines.json"}"\n')
    command = ["tune", "tiny-controlnet", "--engines", "--models", str(models), "--config", str(given), "--json"]
    assert main([*command, "--rounds", "2", "--size", "64x64"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == dict.fromkeys(
        ("torch", "onnxruntime", "openvino"), 2
    )
    path = tmp_path / "engines.json"
    content = json.loads(path.read_text())
    content["choices"][0]["engine"] = "onnxruntime"  # which of them it was is the machine's affair
    path.write_text(json.dumps(content))
    with running_mesh(models=str(models), engines_file=str(path)) as mesh, Client(mesh.grpc_address) as client:
        told = {(one.role, one.name): one.backend for one in client.models()}
    assert told["controlnet", "tiny-controlnet"] == "onnxruntime"
    assert told["diffusion", "tiny-sd"] == "torch"


def test_the_shipped_model_draws_the_same_on_every_engine() -> None:
    """Its UNet sums up the prompt, and its latents have 16 channels."""
    made = {}
    for engine in ("torch", "onnxruntime"):
        with (
            running_mesh(models=str(imagemesh_models.root()), backend=engine, without=("controlnet", "vit")) as mesh,
            Client(mesh.grpc_address) as client,
        ):
            made[engine] = draw(client)[0]
    assert worst(made["onnxruntime"], made["torch"]) <= 2
