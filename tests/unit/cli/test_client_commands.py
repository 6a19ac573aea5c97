"""The client commands: options reach the gateway, answers reach files and stdout, failures are a line and a code."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imagemesh.v1 import diffusion_service_pb2, image_pb2, priority_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_runtime.errors import InternalError, InvalidArgument, NotFound, Overloaded
from tests.support.recording_gateway import RecordingGateway, png
from tests.unit.cli.conftest import Run


def test_every_option_of_generate_reaches_the_request(gateway: RecordingGateway, run: Run, tmp_path: Path) -> None:
    edges = tmp_path / "edges.png"
    edges.write_bytes(png(9))
    code, _, _ = run(
        "generate", "a fox", "-o", tmp_path / "fox.png", "--seed", 7, "--steps", 5, "--guidance", 3.5, "--size",
        "64x72", "--scheduler", "Euler a", "--negative", "blurry", "--model", "sd-tiny", "-n", 2, "--clip-skip", 1,
        "--control", edges, "--control-model", "canny", "--control-scale", 0.5, "--control", edges,
        "--image", edges, "--strength", 0.5, "--mask", edges, "--invert-mask", "--mask-blur", 3, "--keep-unmasked",
        "--mask-padding", 8, "--hires", "128x144", "--hires-upscaler", "Lanczos", "--hires-steps", 9,
        "--hires-strength", 0.25,
        "--priority", "batch", "--literal-prompt", "--control-type", "depth",
        "--control-reuse", 3, "--control-conditional-only", "--control-rounding", "int8",
        "--reference", edges, "--reference-adapter", "plus", "--reference-scale", 0.5, "--reference", edges,
        "--guider", "PAG", "--guider-option", "perturbed_guidance_scale=2", "--guider-option", "stop=0.8",
        "--scheduler-option", "solver_order=3", "--scheduler-option", "timestep_spacing=trailing",
        "--classify", 3, "--classify-model", "vit", "--embed", "--embed-model", "deit",
        "--keep", "fox", "--keep-among", 2, "--keep-probability", 0.5, "--retries", 4,
    )  # fmt: skip
    image = image_pb2.Image(encoded=png(9))
    controls = [
        pb.GenerateControl(model="canny", image=image, scale=0.5, control_type="depth"),
        pb.GenerateControl(image=image, scale=1.0),
    ]
    expected = pb.GenerateRequest(
        prompt="a fox", seed=7, steps=5, guidance_scale=3.5, width=64, height=72, scheduler="Euler a",
        negative_prompt="blurry", model="sd-tiny", num_images=2, clip_skip=1, controls=controls,
        image=image, strength=0.5, mask=image, invert_mask=True, mask_blur=3, keep_unmasked=True,
        priority=priority_pb2.PRIORITY_BATCH, mask_padding=8, literal_prompt=True,
        hires=pb.GenerateHires(width=128, height=144, upscaler="Lanczos", steps=9, strength=0.25),
        scheduler_options={"solver_order": "3", "timestep_spacing": '"trailing"'},
        guider="PAG", guider_options={"perturbed_guidance_scale": "2", "stop": "0.8"},
        control_savings=diffusion_service_pb2.ControlSavings(reuse_steps=3, conditional_only=True, residuals="int8"),
        references=[
            pb.GenerateReference(image=image, adapter="plus", scale=0.5), pb.GenerateReference(image=image, scale=1.0)
        ],
        classify=pb.GenerateClassify(top_k=3, model="vit"), embed=pb.GenerateEmbed(model="deit"),
        keep=pb.GenerateKeep(label="fox", top_k=2, min_probability=0.5, retries=4),
    )  # fmt: skip
    assert (code, gateway.requests) == (0, [expected])


def test_generate_writes_the_picture_and_says_how_it_came_to_be(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    assert run("generate", "a fox", "-o", file) == (
        0,
        f"{file}: seed 41, 8x8, 3 steps, guidance 7.5, DDIM, sd-tiny\n",
        "",
    )
    assert file.read_bytes() == png(41)


def test_several_pictures_are_numbered(run: Run, tmp_path: Path) -> None:
    assert run("generate", "a fox", "-o", tmp_path / "fox.png", "-n", 3, "--seed", 5)[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        f"fox-{i}.png": png(5 + i) for i in range(3)
    }


def test_generate_converts_to_what_the_suffix_says(run: Run, tmp_path: Path) -> None:
    assert run("generate", "a fox", "-o", tmp_path / "fox.jpg")[0] == 0
    with Image.open(tmp_path / "fox.jpg") as picture:
        assert picture.format == "JPEG"


def test_generate_as_json(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    code, out, err = run("generate", "a fox", "-o", file, "--seed", 7, "--json")
    answer = json.loads(out)
    assert (code, err, answer["id"], answer["images"]) == (0, "", "g1", [{"file": str(file), "seed": 7}])
    assert (answer["parameters"]["prompt"], answer["parameters"]["backends"]) == ("a fox", {"vae": "fake"})
    assert answer["timings"] == [
        {"stage": "vae", "seconds": 0.5, "compute_seconds": 0.25, "queue_seconds": 0.125, "bytes_sent": 10,
         "bytes_received": 20}
    ]  # fmt: skip


def test_models_prints_a_table_and_who_is_missing(run: Run) -> None:
    code, out, err = run("models")
    assert [line.split() for line in out.splitlines()] == [
        ["MODEL", "ROLE", "BACKEND", "DTYPE", "DEVICE", "LOADED", "SCHEDULER"],
        ["sd-tiny", "diffusion", "torch", "float32", "cpu", "yes", "DPM++", "2M", "(DPMSolverMultistepScheduler)"],
    ]
    assert (code, err) == (0, "imagemesh: not reachable: vit; their models are missing from the list\n")


def test_a_mesh_without_models_tells_where_they_belong(gateway: RecordingGateway, run: Run) -> None:
    gateway.has_models = False
    code, out, err = run("models")
    assert (code, out) == (0, "")
    assert err.startswith(
        "imagemesh: no model: the services looked in /models, /more; a model is a folder below one of "
    )
    assert json.loads(run("models", "--json")[1]) == {"models": [], "unreachable": [], "roots": ["/models", "/more"]}


def test_schedulers_and_guiders_are_tables(run: Run) -> None:
    code, out, err = run("schedulers")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == ["DPM++", "2M", "DPMSolverMultistepScheduler", "solver_order=2"]
    assert run("guiders")[1].splitlines()[1].split() == ["APG", "Adaptive", "turns"]


def test_schedulers_as_json_tell_what_they_accept(run: Run) -> None:
    (told,) = json.loads(run("schedulers", "--json")[1])
    assert (told["name"], told["options"], told["accepts"]) == (
        "DPM++ 2M",
        {"solver_order": 2},
        {"solver_order": "1 to 3"},
    )


def test_models_as_json(run: Run) -> None:
    code, out, err = run("models", "--json")
    properties = {"width": "64", "scheduler": "DPM++ 2M", "scheduler_class": "DPMSolverMultistepScheduler"}
    model = {"name": "sd-tiny", "role": "diffusion", "backend": "torch", "dtype": "float32", "device": "cpu",
             "loaded": True, "properties": properties}  # fmt: skip
    assert (code, json.loads(out), err) == (0, {"models": [model], "unreachable": ["vit"], "roots": ["/models"]}, "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("steps", 0, "1 to 1000"), 2),
        (NotFound("model", "nope", ["sd-tiny"]), 2),
        (Overloaded("diffusion", 32, 2.5), 1),
        (InternalError("abc"), 1),
    ],
)
def test_the_gateways_error_is_a_line_and_a_code(
    gateway: RecordingGateway, run: Run, tmp_path: Path, error: Exception, code: int
) -> None:
    gateway.error = error  # type: ignore[assignment]
    assert run("generate", "a fox", "-o", tmp_path / "fox.png") == (code, "", f"imagemesh: {error}\n")
    assert list(tmp_path.iterdir()) == []


def test_nobody_there_is_a_line_that_tells_what_to_do(run: Run) -> None:
    code, out, err = run("models", "--server", "127.0.0.1:1")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "127.0.0.1:1" in err
    assert "imagemesh up" in err


def test_a_gateway_that_hangs_is_given_up_after_the_timeout(
    gateway: RecordingGateway, run: Run, tmp_path: Path
) -> None:
    gateway.hold = True
    code, out, err = run("generate", "a fox", "-o", tmp_path / "fox.png", "--timeout", 0.3)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert gateway.cancelled.wait(20)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a fox"],
        ["generate", "a fox", "-o", "nowhere/fox.png"],
        ["generate", "a fox", "-o", "fox.tiff"],
        ["generate", "a fox", "-o", "fox.png", "--size", "64"],
        ["generate", "a fox", "-o", "fox.png", "--seed", "-1"],
        ["generate", "a fox", "-o", "fox.png", "--control", "missing.png"],
        ["generate", "a fox", "-o", "fox.png", "--control-model", "canny"],
        ["generate", "a fox", "-o", "fox.png", "--control-start", "0.5"],
        ["generate", "\udcff", "-o", "fox.png"],
        ["classify"],
        ["classify", "missing.png"],
        ["embed", "missing.png"],
        ["models", "--server", "nowhere"],
        ["paint"],
        [],
    ],
)
def test_wrong_usage_is_code_2_and_asks_nobody(
    gateway: RecordingGateway, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out, gateway.requests) == (2, "", [])
    assert "imagemesh" in err
    assert "Traceback" not in err


def test_a_file_that_cannot_be_written_is_a_line_and_code_1(run: Run, tmp_path: Path) -> None:
    blocked = tmp_path / "fox.png"
    (tmp_path / "fox-0.png").mkdir()
    code, out, err = run("generate", "a fox", "-o", blocked, "-n", 2)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "fox-0.png" in err


def test_the_option_wins_over_the_environment(
    gateway: RecordingGateway, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMESH_SERVER", "127.0.0.1:1")
    assert run("models", "--server", gateway.address)[0] == 0
