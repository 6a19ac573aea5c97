"""OpenAI's own client, unmodified, against the mesh."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.support.mesh import running_mesh


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with running_mesh(backend="torch", models=str(models)) as host:
        yield f"http://{host.http_address}"


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def test_pictures_are_those_that_generate_makes(client: openai.OpenAI, address: str) -> None:
    extra = {"seed": 7, "steps": 2, "negative_prompt": "blur"}
    made = client.images.generate(prompt="a fox", n=2, size="64x48", quality="high", user="me", extra_body=extra)
    assert made.data is not None
    called = httpx.post(
        f"{address}/v1/generate", json={"prompt": "a fox", "num_images": 2, "width": 64, "height": 48, **extra}
    ).json()
    assert [one.b64_json for one in made.data] == [one["png"] for one in called["images"]]
    assert (made.size, made.output_format, made.data[1].seed) == ("64x48", "png", 8)  # type: ignore[union-attr]


def test_links_lead_to_the_pictures(client: openai.OpenAI) -> None:
    made = client.images.generate(prompt="x", size="64x64", response_format="url", extra_body={"steps": 1, "seed": 1})
    told = client.images.generate(
        prompt="x", size="64x64", response_format="b64_json", extra_body={"steps": 1, "seed": 1}
    )
    assert made.data is not None
    assert told.data is not None
    picture = httpx.get(str(made.data[0].url))
    assert picture.headers["content-type"] == "image/png"
    assert base64.b64encode(picture.content).decode() == told.data[0].b64_json


@pytest.mark.parametrize(("kind", "magic"), [("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_other_formats_are_made(client: openai.OpenAI, kind: str, magic: bytes) -> None:
    made = client.images.generate(
        prompt="x",
        size="64x64",
        output_format=kind,
        output_compression=90,
        extra_body={"steps": 1},  # type: ignore[call-overload]
    )
    assert base64.b64decode(made.data[0].b64_json).startswith(magic)
    assert made.output_format == kind


def test_an_edit_redraws_where_the_mask_is_transparent(client: openai.OpenAI) -> None:
    source = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    alpha = np.full((64, 64, 4), 255, np.uint8)
    alpha[:, :32, 3] = 0
    made = client.images.edit(
        image=("in.png", png(Image.fromarray(source))),
        mask=("mask.png", png(Image.fromarray(alpha))),
        prompt="a fox",
        size="64x64",
        n=1,
        extra_body={"steps": 2, "seed": 3},
    )
    assert made.data is not None
    after = pixels(base64.b64decode(str(made.data[0].b64_json)))
    np.testing.assert_array_equal(after[:, 32:], source[:, 32:])
    assert np.abs(after[:, :32] - source[:, :32]).mean() > 10


def test_a_picture_that_is_transparent_is_its_own_mask(client: openai.OpenAI) -> None:
    source = np.full((64, 64, 4), 200, np.uint8)
    source[..., 3] = 255
    source[:, :32, 3] = 0
    made = client.images.edit(image=[png(Image.fromarray(source))], prompt="a fox", extra_body={"steps": 2})
    assert made.data is not None
    assert (pixels(base64.b64decode(str(made.data[0].b64_json)))[:, 32:] == 200).all()


def test_an_edit_without_a_mask_starts_from_the_picture(client: openai.OpenAI, control_image: Image.Image) -> None:
    extra = {"steps": 4, "seed": 3, "strength": 0.25}
    made = client.images.edit(image=png(control_image), prompt="a fox", size="64x64", extra_body=extra)
    assert made.data is not None
    assert made.data[0].b64_json


def test_models_are_listed_and_told(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {"tiny-sd", "tiny-controlnet", "tiny-vit"} <= set(listed)
    roles = {part["role"] for part in client.models.retrieve("tiny-sd").parts}  # type: ignore[attr-defined]
    assert roles == {"text-encoder", "diffusion", "vae"}
    with pytest.raises(openai.NotFoundError, match="model 'tiny-ds' not found, perhaps 'tiny-sd'"):
        client.models.retrieve("tiny-ds")


BAD = {
    "prompt": {"prompt": 7},
    "size": {"size": "huge"},
    "size ": {"size": "65x64"},
    "n": {"n": 0},
    "background": {"background": "transparent"},
    "stream": {"extra_body": {"stream": True}},
    "output_format": {"output_format": "jpeg", "response_format": "url"},
    "sneed": {"extra_body": {"sneed": 1}},
    "steps": {"extra_body": {"steps": 5000}},
}


@pytest.mark.parametrize(("field", "asked"), BAD.items())
def test_bad_fields_are_told_in_openais_form(client: openai.OpenAI, field: str, asked: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "x", **asked})  # type: ignore[call-overload]
    assert (caught.value.param, caught.value.type) == (field.strip(), "invalid_request_error")
    assert caught.value.code == "invalid_argument"


def test_an_unknown_model_is_told_in_openais_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="x", model="dall-e-3")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_bad_files_are_told_in_openais_form(client: openai.OpenAI, control_image: Image.Image) -> None:
    with pytest.raises(openai.BadRequestError, match="image must be"):
        client.images.edit(image=b"no picture", prompt="x")
    with pytest.raises(openai.BadRequestError, match="mask must be transparent where to redraw"):
        client.images.edit(image=png(control_image), mask=png(control_image), prompt="x")
    with pytest.raises(openai.BadRequestError, match="image must be one picture"):
        client.images.edit(image=[png(control_image)] * 2, prompt="x")
    with pytest.raises(openai.BadRequestError, match="n must be 1 to 64, got '0'"):
        client.images.edit(image=png(control_image), prompt="x", n=0)


def test_a_form_that_is_none_is_refused(address: str) -> None:
    for content, kind in ((b"x", "multipart/form-data"), (b"{}", "application/json")):
        answer = httpx.post(f"{address}/v1/images/edits", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
