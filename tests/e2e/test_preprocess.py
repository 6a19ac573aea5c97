"""Preprocessors through the whole mesh: by the SDK, over HTTP and by the command, alone and on the way to a picture."""

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from imagemesh_cli.host import MeshHost
from imagemesh_cli.main import main
from imagemesh_client import AsyncClient, Client, Control, Hires, InvalidArgument, MeshError
from tests.support.mesh import running_mesh
from tests.support.tiny_annotators import build_dpt

SIDE = 64
CANNY = {"low_threshold": 30, "high_threshold": 90}
PROMPT: dict[str, Any] = {"prompt": "the cat", "seed": 3, "steps": 2}


@pytest.fixture(scope="module")
def mesh(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshHost]:
    more = tmp_path_factory.mktemp("depth")
    build_dpt(more / "tiny-dpt")
    with running_mesh(backend="torch", models=os.pathsep.join(map(str, (models, more)))) as host:
        yield host


@pytest.fixture(scope="module")
def client(mesh: MeshHost) -> Iterator[Client]:
    with Client(mesh.grpc_address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Blocks and noise, of the size that the model draws."""
    numbers = np.random.default_rng(0)
    blocks = numbers.integers(0, 256, (8, 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
    return np.clip(blocks + numbers.integers(-20, 20, blocks.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def file(picture: np.ndarray, tmp_path: Path) -> Path:
    Image.fromarray(picture).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def drawn(client: Client, *controls: Control, **options: Any) -> np.ndarray:
    generation = client.generate(**PROMPT | options, controls=controls)
    return np.asarray(generation.images[0].to_pil())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("canny", CANNY),
        ("softedge", {}),
        ("depth", {"invert": True}),
        ("none", {}),
    ],
)
def test_a_generation_follows_what_the_preprocessor_makes(client, picture, name, parameters):
    hint = client.preprocess(picture, name, parameters=parameters)
    asked = drawn(client, Control(picture, preprocessor=name, parameters=parameters))
    np.testing.assert_array_equal(asked, drawn(client, Control(hint.pixels)))
    plain = drawn(client, Control(picture))
    assert (asked != plain).any() == (name != "none")


def test_every_unit_has_a_preprocessor_of_its_own(client, picture):
    canny, grid = client.preprocess(picture, "canny").pixels, client.preprocess(picture, "colour").pixels
    units = (Control(picture, scale=0.7, preprocessor="canny"), Control(picture, preprocessor="t2ia_color_grid"))
    wanted = drawn(client, Control(canny, scale=0.7), Control(grid))
    np.testing.assert_array_equal(drawn(client, *units), wanted)


def test_what_was_made_of_what_is_told(client, picture):
    generation = client.generate(**PROMPT, controls=[Control(picture, preprocessor="Depth Anything")])
    assert generation.parameters.backends["preprocess[0]"] == "torch"
    (timing,) = (timing for timing in generation.timings if timing.stage == "preprocess[0]")
    assert timing.seconds > 0
    assert timing.bytes_received > SIDE * SIDE * 3
    text = generation.images[0].to_pil().text["parameters"]
    assert 'ControlNet 0: "Module: depth, Model: tiny-controlnet, Weight: 1"' in text


def test_the_second_pass_has_its_own_hint(client, picture):
    control = Control(picture, preprocessor="canny")
    generation = client.generate(**PROMPT, controls=[control], hires=Hires(1.5, steps=2, strength=1.0))
    assert generation.images[0].to_pil().size == (96, 96)
    stages = {timing.stage for timing in generation.timings}
    assert {"preprocess[0]", "preprocess[0]-hires"} <= stages


def test_another_resolution_is_brought_to_the_generations_size(client, picture):
    small = client.preprocess(picture, "canny", resolution=32)
    assert small.pixels.shape == (32, 32, 3)
    fitted = np.asarray(small.to_pil().resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    asked = drawn(client, Control(picture, preprocessor="canny", resolution=32))
    np.testing.assert_array_equal(asked, drawn(client, Control(fitted)))


@pytest.mark.parametrize(
    ("control", "code", "said"),
    [
        ({"preprocessor": "cany"}, "NOT_FOUND", "preprocessor 'cany' not found, perhaps 'canny'; available: blur"),
        ({"preprocessor": "openpose"}, "NOT_FOUND", "model for preprocessor openpose 'any' not found; available: none"),
        (
            {"preprocessor": "canny", "parameters": {"low_threshold": 300}},
            "INVALID_ARGUMENT",
            "controls[1].preprocessor_parameters['low_threshold'] must be a whole number from 0 to 255, got '300'",
        ),
        (
            {"preprocessor": "invert", "parameters": {"much": True}},
            "INVALID_ARGUMENT",
            "controls[1].preprocessor_parameters must be a map of nothing for preprocessor invert, got 'much'",
        ),
        (
            {"preprocessor": "canny", "resolution": 7},
            "INVALID_ARGUMENT",
            "controls[1].preprocessor_resolution must be 16 to 4096, got 7",
        ),
        (
            {"preprocessor": "canny", "preprocessor_model": "tiny-dpt"},
            "INVALID_ARGUMENT",
            "controls[1].preprocessor_model must be empty for preprocessor canny",
        ),
    ],
)
def test_what_cannot_be_is_told_before_any_work(client, picture, control, code, said):
    units = [Control(picture), Control(picture, **control)]
    for attempt in (client.generate, client.jobs.create):
        with pytest.raises(MeshError) as caught:
            attempt(**PROMPT, controls=units)
        assert (caught.value.code.name, said in str(caught.value)) == (code, True)


def test_a_job_preprocesses_as_a_call_does(client, picture):
    control = Control(picture, preprocessor="canny")
    generation = client.jobs.wait(client.jobs.create(**PROMPT, controls=[control]).id)
    made = np.asarray(generation.images[0].to_pil())
    np.testing.assert_array_equal(made, drawn(client, control))


def test_the_sdk_tells_what_there_is(client):
    found = {one.name: one for one in client.preprocessors()}
    assert found["depth"].models == ("tiny-dpt",)
    assert (found["depth"].available, found["segmentation"].available) == (True, False)
    low = found["canny"].parameters[0]
    assert (low.name, low.type, low.default, low.minimum, low.maximum) == ("low_threshold", "integer", 100, 0, 255)
    assert found["depth"].parameters[0].minimum is None
    assert found["recolour"].parameters[0].choices == ("luminance", "intensity")


async def test_the_async_client_does_the_same(mesh, client, picture):
    async with AsyncClient(mesh.grpc_address) as aio:
        made = await aio.preprocess(picture, "lineart", parameters={"sigma": 3})
        assert await aio.preprocessors() == client.preprocessors()
    np.testing.assert_array_equal(made.pixels, client.preprocess(picture, "lineart", parameters={"sigma": 3.0}).pixels)


def test_values_that_have_no_place_are_refused_by_the_sdk(client, picture):
    with pytest.raises(InvalidArgument, match=r"parameters\['a'\]"):
        client.preprocess(picture, "canny", parameters={"a": object()})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def http(mesh: MeshHost) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{mesh.http_address}", timeout=60) as http:
        yield http


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_http_answers_a_png_or_json(http, client, file, picture):
    body = {"preprocessor": "canny", "image": base64_of(file), "parameters": {"low_threshold": 20}}
    wanted = client.preprocess(picture, "canny", parameters={"low_threshold": 20}).pixels
    png = http.post("/v1/preprocess", json=body, headers={"Accept": "image/png"})
    assert png.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png.content))), wanted)
    told = http.post("/v1/preprocess", json=body).json()
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(told.pop("png")))))
    np.testing.assert_array_equal(made, wanted)
    assert told == {"width": SIDE, "height": SIDE, "preprocessor": "canny", "model": "", "backend": "opencv"}


def test_http_lists_the_preprocessors(http):
    found = {one["name"]: one for one in http.get("/v1/preprocessors").json()["preprocessors"]}
    assert found["normal"]["models"] == ["tiny-dpt"]
    assert found["lineart"]["aliases"][0] == "lineart_standard"
    assert found["depth"]["parameters"][0]["default"] is False
    low = found["canny"]["parameters"][0]
    assert {key: low[key] for key in ("name", "type", "default", "minimum", "maximum")} == {
        "name": "low_threshold", "type": "integer", "default": 100, "minimum": 0, "maximum": 255,
    }  # fmt: skip


def test_http_generates_with_a_preprocessor(http, client, file, picture):
    control = {"image": base64_of(file), "preprocessor": "canny", "preprocessor_parameters": {"low_threshold": 20}}
    answer = http.post("/v1/generate", json=PROMPT | {"controls": [control]}, headers={"Accept": "image/png"})
    made = np.asarray(Image.open(io.BytesIO(answer.content)))
    wanted = drawn(client, Control(picture, preprocessor="canny", parameters={"low_threshold": 20}))
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize(
    ("change", "status", "field", "said"),
    [
        ({"preprocessor": "sketch"}, 404, None, "preprocessor 'sketch' not found"),
        ({"preprocessor": "segmentation"}, 404, None, "model for preprocessor segmentation"),
        ({"parameters": {"low_threshold": -1}}, 400, "parameters['low_threshold']", "a whole number from 0 to 255"),
        ({"parameters": [1]}, 400, "parameters", "an object of numbers"),
        ({"resolution": -1}, 400, "resolution", "0, or 16 to 4096"),
        ({"image": "%%%"}, 400, "image", "a PNG, JPEG or WebP file in base64"),
        ({"image": "aGk="}, 400, "image.encoded", "a whole PNG, JPEG, WEBP file"),
        (
            {"prompt": "x"},
            400,
            "prompt",
            "(the fields are preprocessor, image, parameters, resolution, model)",
        ),
    ],
)
def test_http_tells_what_is_wrong(http, file, change, status, field, said):
    body = {"preprocessor": "canny", "image": base64_of(file)} | change
    answer = http.post("/v1/preprocess", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.get("field") == field
    assert said in error["message"]


def command(mesh: MeshHost, *arguments: str | Path) -> int:
    return main([*map(str, arguments), "--server", mesh.grpc_address])


def test_the_command_preprocesses_a_file(mesh, client, file, picture, capsys):
    out = file.with_name("edges.png")
    assert command(mesh, "preprocess", "Canny", file, "-o", out, "--parameter", "low_threshold=20") == 0
    assert capsys.readouterr().out == f"{out}: canny, 64x64, opencv\n"
    wanted = client.preprocess(picture, "canny", parameters={"low_threshold": 20}).pixels
    np.testing.assert_array_equal(np.asarray(Image.open(out)), wanted)
    assert command(mesh, "preprocess", "depth", file, "-o", out, "--resolution", "32", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["width"], told["model"], told["backend"]) == (32, "tiny-dpt", "torch")


def test_the_command_lists_preprocessors(mesh, capsys):
    assert command(mesh, "preprocessors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "PARAMETERS", "NEEDS", "WHAT", "IT", "MAKES"]
    assert any(line.startswith("canny") and "low_threshold=100" in line for line in lines)
    assert any(line.startswith("openpose") and "a model, none here" in line for line in lines)
    assert command(mesh, "preprocessors", "--json") == 0
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} >= {"canny", "depth"}


def test_the_command_generates_with_a_preprocessor(mesh, client, file, picture, capsys):
    out = file.with_name("made.png")
    arguments = ("generate", "the cat", "-o", out, "--seed", "3", "--steps", "2", "--control", file)
    assert command(mesh, *arguments, "--control-preprocessor", "canny:low_threshold=30,high_threshold=90") == 0
    wanted = drawn(client, Control(picture, preprocessor="canny", parameters=CANNY))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), wanted)
    assert command(mesh, *arguments, *["--control-preprocessor", "canny"] * 2) == 2
    assert "--control-preprocessor must be given at most once for each --control (1)" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(mesh, file, capsys):
    out = file.with_name("never.png")
    assert command(mesh, "preprocess", "cany", file, "-o", out) == 2
    assert "perhaps 'canny'" in capsys.readouterr().err
    assert command(mesh, "preprocess", "blur", file, "-o", out, "--parameter", "sigma=1000") == 2
    assert "parameters['sigma'] must be a number from 0.1 to 64" in capsys.readouterr().err
    assert not out.exists()
