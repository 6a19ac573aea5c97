"""Every mode of generating over HTTP: the same picture as over gRPC, and every field named where it is wrong."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from imagemesh_cli.host import MeshHost
from imagemesh_client import Client, Control, ControlSavings, Hires
from imagemesh_gateway.http_body import (
    ALLOWED,
    ClassifyBody,
    ControlBody,
    EmbedBody,
    GenerateBody,
    HiresBody,
    KeepBody,
    ReferenceBody,
    SavingsBody,
)
from tests.support.mesh import running_mesh

COMMON = {"prompt": "a fox", "seed": 7, "steps": 4, "guidance": 3.0, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def mesh(models: Path) -> Iterator[MeshHost]:
    with running_mesh(backend="torch", models=str(models)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    rows = np.linspace(0, 255, 64, dtype=np.uint8)
    across, down = np.meshgrid(rows, rows)
    return Image.fromarray(np.stack([across, down, np.full_like(across, 90)], axis=2))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    drawn = np.zeros((64, 64, 3), dtype=np.uint8)
    drawn[16:48, 16:48] = 255
    return Image.fromarray(drawn)


def coded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


TEXT = base64.b64encode(b"text").decode()
# A PNG file that ends amid its pixels.
TORN = coded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))[:4000]


def post(mesh: MeshHost, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"http://{mesh.http_address}/v1/generate", json=body, timeout=120)


def same(mesh: MeshHost, body: dict[str, Any], **options: Any) -> None:
    """HTTP's pictures for ``body`` are gRPC's for ``options``."""
    answer = post(mesh, COMMON | body)
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(one["png"]) for one in answer.json()["images"]]
    with Client(mesh.grpc_address) as client:
        made = client.generate(**(COMMON | options))
    assert len(files) == len(made.images)
    for file, image in zip(files, made.images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), np.asarray(image.to_pil()))


def test_image_to_image(mesh: MeshHost, picture: Image.Image) -> None:
    same(mesh, {"image": coded(picture), "strength": 0.5}, image=picture, strength=0.5)


def test_a_data_url_is_a_picture_too(mesh: MeshHost, picture: Image.Image) -> None:
    url = f"data:image/png;base64,{coded(picture)}"
    same(mesh, {"image": url, "strength": 0.5}, image=picture, strength=0.5)


def test_inpainting(mesh: MeshHost, picture: Image.Image, mask: Image.Image) -> None:
    how = {"mask_blur": 2, "keep_unmasked": True, "invert_mask": True, "mask_padding": 4}
    same(mesh, {"image": coded(picture), "mask": coded(mask), **how}, image=picture, mask=mask, **how)


def test_a_control(mesh: MeshHost, picture: Image.Image) -> None:
    unit = {"image": coded(picture), "scale": 0.7}
    same(mesh, {"controls": [unit]}, controls=[Control(picture, scale=0.7)])


def test_a_control_for_a_part_of_the_steps(mesh: MeshHost, picture: Image.Image) -> None:
    how = {"scale": 0.7, "start": 0.25, "end": 0.75, "guess_mode": True, "block_weights": [0, 1, 0.5, 2, 1]}
    same(mesh, {"controls": [{"image": coded(picture), **how}]}, controls=[Control(picture, **how)])  # type: ignore[arg-type]


def test_a_control_that_is_saved_on(mesh: MeshHost, picture: Image.Image) -> None:
    how = {"reuse_steps": 2, "conditional_only": True, "residuals": "fp8"}
    body = {"controls": [{"image": coded(picture)}], "control_savings": how}
    same(mesh, body, controls=[Control(picture)], control_savings=ControlSavings(**how))  # type: ignore[arg-type]


def test_a_second_pass(mesh: MeshHost) -> None:
    hires = {"scale": 1.5, "upscaler": "Lanczos", "strength": 0.5, "steps": 4}
    same(mesh, {"hires": hires}, hires=Hires(scale=1.5, upscaler="Lanczos", strength=0.5, steps=4))


def test_seeds_variations_options_and_priority(mesh: MeshHost) -> None:
    noise = {"seed": None, "seeds": [3, 9], "variation_seed": 5, "variation_strength": 0.25, "clip_skip": 1}
    course = {"scheduler": "DPM++ 2M", "scheduler_options": {"solver_order": 3, "use_karras_sigmas": True}}
    same(mesh, noise | course | {"priority": "batch"}, **noise, **course, priority="batch")


def test_guiders(mesh: MeshHost) -> None:
    layers = {"guider": "PAG", "guider_options": {"perturbed_guidance_layers": ["mid_block"], "stop": 0.8}}
    same(mesh, layers, **layers)  # type: ignore[arg-type]


def test_several_pictures(mesh: MeshHost) -> None:
    same(mesh, {"num_images": 2}, n=2)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"image": "not base64!"}, "image", "a PNG, JPEG or WebP file in base64"),
        ({"image": 7}, "image", "a PNG, JPEG or WebP file in base64"),
        ({"image": TEXT}, "image", "a whole PNG, JPEG, WEBP file"),
        ({"strength": 0.5}, "image", "since strength is given"),
        ({"strength": 1.5}, "strength", "above 0, and at most 1"),
        ({"priority": "urgent"}, "priority", "interactive, normal, batch"),
        ({"scheduler_options": {"solver_order": [3]}}, "scheduler_options", "an object of numbers"),
        ({"guider_options": {"stop": {}}}, "guider_options", "an object of numbers"),
        ({"guider_options": {"stop": 2}}, "guider_options", "a number from 0 to 1"),
        ({"seeds": [-1]}, "seeds.0", "a list of at most 64"),
        ({"hires": {"scale": 2, "upscaler": 3}}, "hires.upscaler", "a string of valid Unicode"),
        ({"hires": {"scale": 2, "sneed": 3}}, "hires.sneed", "left out (the fields are scale, width, height, upscaler"),
        ({"hires": {"scale": 9}}, "hires.scale", "at most 8"),
        ({"hires": {"scale": 0}}, "hires.scale", "above 1, and at most 8, got 0"),
        ({"hires": {"width": 0, "height": 64}}, "hires.width", "from 1 to 4096, got 0"),
        ({"hires": {}}, "hires.scale", "or else hires.width and hires.height"),
        ({"hires": {"scale": 2, "steps": 0}}, "hires.steps", "1 to 1000, got 0"),
        ({"controls": [{"scale": 1}]}, "controls.0.image", "a PNG, JPEG or WebP file in base64"),
        ({"controls": [{"image": TEXT}]}, "controls[0].image.encoded", "a whole PNG, JPEG, WEBP file"),
        ({"controls": [{"image": TORN}]}, "controls[0].image.encoded", "a whole PNG, JPEG, WEBP file"),
        ({"controls": [{"image": "not base64!"}]}, "controls.0.image", "a PNG, JPEG or WebP file in base64"),
        ({"controls": [{"image": "", "scale": 11}]}, "controls.0.scale", "0 to 10.0"),
        ({"controls": [{}] * 9}, "controls", "a list of at most 8 objects"),
        ({"controls": [{"image": "", "control_type": 3}]}, "controls.0.control_type", "a string of valid Unicode"),
        ({"control_savings": {"residuals": "int4"}}, "control_savings.residuals", "an empty string, int8 or fp8"),
        ({"control_savings": {"reuse_steps": 2}}, "control_savings", "there is no ControlNet to save on"),
        ({"references": [{"image": "", "scale": 11}]}, "references.0.scale", "0 to 10.0"),
        ({"references": [{}] * 9}, "references", "a list of at most 8 objects"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(mesh: MeshHost, body: dict[str, Any], field: str, said: str) -> None:
    error = post(mesh, COMMON | body).json()["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["field"].startswith(field)
    assert said in error["message"]


def test_an_unknown_guider_is_told_which_there_are(mesh: MeshHost) -> None:
    error = post(mesh, COMMON | {"guider": "SEG"}).json()["error"]
    assert error["code"] == "NOT_FOUND"
    assert "guider 'SEG' not found" in error["message"]
    assert "available: APG" in error["message"]


def test_errors_know_every_field() -> None:
    nested = {
        "hires": HiresBody,
        "controls": ControlBody,
        "control_savings": SavingsBody,
        "references": ReferenceBody,
        "classify": ClassifyBody,
        "embed": EmbedBody,
        "keep": KeepBody,
    }
    inside = {f"{name}.{field}" for name, body in nested.items() for field in body.model_fields}
    assert set(ALLOWED) == set(GenerateBody.model_fields) | inside
