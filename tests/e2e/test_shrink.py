"""``imagemesh export``, ``quantize`` and ``distill``: what they save is smaller or faster, and answers alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagemesh_models
from imagemesh_cli.main import main
from imagemesh_services.vit.backend import BACKENDS
from imagemesh_services.vit.config import VitConfig
from imagemesh_training import data
from tests.support.backends import open_backend

SHIPPED = imagemesh_models.root()
Shrink = Callable[..., tuple[int, dict, str]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Things that the shipped classifier knows, 48 of them."""
    folder, sprites = tmp_path_factory.mktemp("pictures"), data.load_sprites()
    things = np.linspace(0, len(sprites) - 1, 48).astype(int)
    for i, thing in enumerate(things):
        colour = list(data.COLOURS)[i % len(data.COLOURS)]
        Image.fromarray(data.draw(data.Scene(int(thing), colour), sprites)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def shrink(pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Shrink:
    """Runs the command on the pictures; answers its code, what it told, and its complaint."""

    def call(command: str, model: str, *arguments: object) -> tuple[int, dict, str]:
        given = ["-o", tmp_path / "models" / "small", "--images", pictures, "--json", *arguments]
        code = main([command, model, *map(str, given)])
        out, err = capfd.readouterr()
        return code, json.loads(out) if out.startswith("{") else {}, err

    return call


def served(tmp_path: Path, backend: str, pictures: Path) -> list[str]:
    """The labels that the saved folder gives the first pictures."""
    model = open_backend(BACKENDS, backend, VitConfig, tmp_path / "models").load("small")
    files = sorted(pictures.iterdir())[:8]
    pixels = np.stack([model.preprocess(np.asarray(Image.open(file))) for file in files])
    return [model.labels[i] for i in model.classify(pixels).argmax(axis=1)]


@pytest.fixture(scope="module")
def wanted(pictures: Path) -> list[str]:
    model = open_backend(BACKENDS, "torch", VitConfig, SHIPPED).load("emoji-vit")
    files = sorted(pictures.iterdir())[:8]
    pixels = np.stack([model.preprocess(np.asarray(Image.open(file))) for file in files])
    return [model.labels[i] for i in model.classify(pixels).argmax(axis=1)]


@pytest.mark.parametrize(("to", "backend"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_an_exported_model_agrees_on_all_and_is_served(shrink, tmp_path, pictures, wanted, to, backend):
    code, told, err = shrink("export", "emoji-vit", "--to", to, "--floor", 1)
    assert code == 0, err
    assert (told["agreement"], told["pictures"], told["saved"]) == (1, 48, True)
    assert told["difference"] < 1e-4
    assert told["speed_range"][0] <= told["speed"] <= told["speed_range"][1]
    assert served(tmp_path, backend, pictures) == wanted


@pytest.mark.parametrize(("scheme", "bytes_a_weight"), [("int8-dynamic", 1.2), ("int8-static", 1.2), ("int4", 0.8)])
def test_a_quantized_model_is_smaller_and_agrees(shrink, tmp_path, pictures, wanted, scheme, bytes_a_weight):
    code, told, err = shrink("quantize", "emoji-vit", "--scheme", scheme, "--floor", 0.9)
    assert code == 0, err
    assert told["saved"] is True
    assert told["agreement"] >= 0.9
    assert told["difference"] > 0
    assert told["bytes_after"] < told["bytes_before"] / 2 * bytes_a_weight  # it is shipped in 16 bits
    assert sum(one == two for one, two in zip(served(tmp_path, "onnxruntime", pictures), wanted, strict=True)) >= 7


def test_a_distilled_model_is_smaller_and_was_taught(shrink, models, tmp_path):
    def distilled(steps: int) -> dict:
        code, told, _ = shrink(
            "distill", "tiny-vit", "--models", models, "--layers", 2, "--steps", steps, "--batch", 16, "--lr", 2e-3,
            "--floor", 0,
        )  # fmt: skip
        assert (code, told["saved"]) == (0, True)
        shutil.move(tmp_path / "models" / "small", tmp_path / str(steps))
        return told

    untaught, taught = distilled(1), distilled(80)
    assert taught["difference"] < untaught["difference"] * 0.75
    assert taught["bytes_after"] < taught["bytes_before"]
    model = open_backend(BACKENDS, "torch", VitConfig, tmp_path).load("80")
    assert len(model.states) == 3
    assert model.labels == open_backend(BACKENDS, "torch", VitConfig, models).load("tiny-vit").labels


def test_what_agrees_too_seldom_is_not_saved(shrink, tmp_path):
    code, told, err = shrink("distill", "emoji-vit", "--layers", 1, "--width", 32, "--steps", 1, "--floor", 0.9)
    assert (code, told["saved"]) == (1, False)
    assert "below the floor of 90.0%: nothing was saved" in err
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(shrink, tmp_path):
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "note.txt").write_text("mine")
    code, _, err = shrink("export", "emoji-vit")
    assert (code, err.count("\n")) == (2, 1)
    assert "a folder that is empty or not there yet" in err
    assert (tmp_path / "models" / "small" / "note.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("export", ("no-vit",), "available: emoji-vit"),
        ("distill", ("emoji-vit", "--layers", 99), "at most 6 layers"),
        ("distill", ("emoji-vit", "--width", 33), "a multiple of 32"),
    ],
)
def test_what_can_not_be_made_is_told(shrink, tmp_path, command, arguments, said):
    code, _, err = shrink(command, *arguments)
    assert code == 2
    assert said in err
    assert not (tmp_path / "models" / "small").exists()


def test_what_fails_while_a_student_is_compared_is_not_called_an_option(shrink, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise ValueError("all the input arrays must have the same shape")

    monkeypatch.setattr("imagemesh_services.vit.comparison.compare", broken)
    code, _, err = shrink("distill", "emoji-vit", "--layers", 1, "--steps", 1)
    assert code not in (0, 2)
    assert "all the input arrays" in err
    assert "--layers" not in err
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_without_pictures_is_told(tmp_path, capfd):
    (tmp_path / "none").mkdir()
    code = main(["export", "emoji-vit", "-o", str(tmp_path / "out"), "--images", str(tmp_path / "none")])
    assert code == 2
    assert "--images must be 1 to 2048 PNG, JPEG or WebP files, got '0 pictures'" in capfd.readouterr().err
