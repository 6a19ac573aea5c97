"""``imagemesh finetune``, and what it makes served by name in a mesh that goes on running."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import pipeline

from imagemesh_cli.host import MeshHost
from imagemesh_cli.main import main
from imagemesh_client import AsyncClient, Client, MeshError
from tests.support.labelled import COLOURS, coloured, put_pictures
from tests.support.mesh import running_mesh

FEW = ["--epochs", "3", "--batch", "8", "--tune", "all", "--lr", "1e-3", "--precision", "float32"]


@pytest.fixture(scope="module")
def root(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the tiny classifier alone."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(models / "tiny-vit", root / "tiny-vit")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_pictures(tmp_path_factory.mktemp("pictures"), 10)


@pytest.fixture(scope="module")
def mesh(root: Path) -> Iterator[MeshHost]:
    """A gateway and the ViT service, which were there before any model was made."""
    others = ("text-encoder", "diffusion", "vae", "controlnet")
    with running_mesh(without=others, models=str(root), device="cpu", dtype="float32") as host:
        yield host


def tuned(root: Path, pictures: Path, capfd: pytest.CaptureFixture[str], *more: object) -> tuple[int, dict, str]:
    """Runs the command; answers its code, what it told, and its complaint."""
    given = ["tiny-vit", "--models", root, "--data", pictures, "-o", root / "colours", "--json", *FEW, *more]
    code = main(["finetune", *map(str, given)])
    out, err = capfd.readouterr()
    return code, json.loads(out) if out else {}, err


def seen(client: Client, model: str) -> list[str]:
    """What it says of a picture of each colour."""
    answers = client.classify([coloured(name, 10**6) for name in COLOURS], 1, model=model)
    return [answer.predictions[0].label for answer in answers]


def test_a_tuned_model_is_served_by_name_without_a_restart(mesh, root, pictures, capfd):
    with Client(mesh.grpc_address) as client:
        with pytest.raises(MeshError, match="colours' not found"):
            seen(client, "colours")
        code, told, err = tuned(root, pictures, capfd)
        assert code == 0, err
        assert (told["accuracy"], told["labels"], told["trained"]) == (1, 3, told["parameters"])
        model = client.load_model("colours")
        assert (model.loaded, model.properties["labels"], model.backend) == (True, "3", "torch")
        assert seen(client, "colours") == list(COLOURS)
        _made_anew(root, pictures, capfd, client)
        _dropped(client)
    _is_a_standard_folder(root / "colours")


def _made_anew(root, pictures, capfd, client) -> None:
    """The same name with other labels takes the old one's place when it is loaded."""
    other = root.parent / "other"
    put_pictures(other, 10, names=("blue", "red"))
    shutil.rmtree(root / "colours")
    code, _, err = tuned(root, other, capfd, "--state", root.parent / "run-of-two")
    assert code == 0, err
    assert seen(client, "colours") == list(COLOURS)
    assert client.load_model("colours").properties["labels"] == "2"
    assert set(seen(client, "colours")) == {"blue", "red"}


def _dropped(client) -> None:
    assert client.unload_model("colours") is True
    assert client.unload_model("colours") is False
    assert [model.loaded for model in client.models() if model.name == "colours"] == [False]
    assert set(seen(client, "colours")) == {"blue", "red"}


def _is_a_standard_folder(folder: Path) -> None:
    from PIL import Image

    classify = pipeline("image-classification", str(folder))
    assert classify(Image.fromarray(coloured("blue", 10**6)))[0]["label"] == "blue"
    record = json.loads((folder / "finetune.json").read_text())
    assert (record["model"], record["plan"]["tune"], record["labels"]) == ("tiny-vit", "all", 2)
    assert not list(folder.parent.glob(".colours.run/*.safetensors"))


@pytest.mark.parametrize("name", ["../tiny-vit", "/etc", "no-vit", ".", "tiny-vit/"])
def test_what_is_no_name_of_the_repository_is_not_found(mesh, name):
    with (
        Client(mesh.grpc_address) as client,
        pytest.raises(MeshError, match=r"not found.*; available: .*tiny-vit") as one,
    ):
        client.load_model(name)
    assert one.value.code.name == "NOT_FOUND"
    with Client(mesh.grpc_address) as client, pytest.raises(MeshError) as two:
        client.unload_model(name)
    assert two.value.code.name == "NOT_FOUND"


async def test_no_name_and_a_broken_folder_are_told_and_harm_no_other(mesh, root):
    async with AsyncClient(mesh.grpc_address) as client:
        for call in (client.load_model, client.unload_model):
            with pytest.raises(MeshError, match="name must be a model's name"):
                await call("")
        shutil.copytree(root / "tiny-vit", root / "torn")
        weights = root / "torn" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(MeshError, match="torn has no weights in safetensors files that can be read") as caught:
            await client.load_model("torn")
        assert caught.value.code.name == "FAILED_PRECONDITION"
        assert (await client.load_model("tiny-vit")).loaded
        assert await client.unload_model("tiny-vit")
        shutil.rmtree(root / "torn")


def test_the_command_loads_and_unloads(mesh, capfd):
    assert main(["load", "tiny-vit", "--server", mesh.grpc_address]) == 0
    assert main(["unload", "tiny-vit", "--server", mesh.grpc_address]) == 0
    assert main(["unload", "tiny-vit", "--server", mesh.grpc_address, "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == ["tiny-vit: loaded by torch in float32 on cpu, 10 labels", "tiny-vit: unloaded"]
    assert json.loads("".join(lines[2:])) == {"name": "tiny-vit", "was_loaded": False}
    assert main(["load", "no-vit", "--server", mesh.grpc_address]) == 2


def test_a_result_below_the_floor_is_not_saved_and_what_it_learned_is_kept(root, pictures, tmp_path, capfd):
    given = ["tiny-vit", "--models", root, "--data", pictures, "-o", tmp_path / "new", "--epochs", 1, "--tune", "head"]
    assert main(["finetune", *map(str, given), "--lr", "1e-9", "--floor", "1"]) == 1
    assert "below the floor of 100.0%: nothing was saved" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["finetune", *map(str, given), "--lr", "1e-9"]) == 0
    said = capfd.readouterr().out
    assert "resumed at step" in said
    assert f"saved in {tmp_path / 'new'}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-vit", "--data", "{pictures}"), "model 'no-vit' not found; available: tiny-vit"),
        (("tiny-vit", "--data", "{pictures}/red"), "a folder of pictures for each label"),
        (("tiny-vit", "--data", "{pictures}", "--layers", "9"), "layers must be 1 to 3 for this model, got 9"),
        (("tiny-vit", "--data", "{pictures}", "--device", "abacus"), "device must be auto or a torch device"),
    ],
)
def test_what_can_not_be_done_is_told_in_a_line(models, pictures, tmp_path, capfd, arguments, said):
    given = [one.format(pictures=pictures) for one in arguments]
    assert main(["finetune", *given, "--models", str(models), "-o", str(tmp_path / "new")]) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("imagemesh: ")
    assert said in told
    assert not (tmp_path / "new").exists()
