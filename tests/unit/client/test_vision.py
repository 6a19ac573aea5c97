"""The SDK understands pictures, whatever form they are in."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import tensor_pb2, vit_service_pb2
from imagemesh_client import (
    AsyncClient,
    Choice,
    Classification,
    Client,
    Embeddings,
    ImageInput,
    InvalidArgument,
    Model,
    Prediction,
    Sampling,
)
from imagemesh_runtime import images
from tests.support.recording_gateway import RecordingGateway, png

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def sent(gateway: RecordingGateway, image: ImageInput) -> np.ndarray:
    """The pixels that a service would see."""
    with Client(gateway.address) as client:
        client.classify(image)
    return images.decode(gateway.requests[-1].images[0], "image")


def lossless(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def test_every_form_of_a_picture_shows_the_same_pixels(gateway: RecordingGateway, tmp_path: Path) -> None:
    file = lossless(Image.fromarray(PIXELS))
    path = tmp_path / "a.png"
    path.write_bytes(file)
    for image in (file, path, str(path), Image.fromarray(PIXELS), PIXELS, PIXELS[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(sent(gateway, image), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "HSV", "YCbCr"])
def test_pictures_of_pillow_in_any_mode_show_what_their_file_shows(gateway: RecordingGateway, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(PIXELS).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(PIXELS[..., 1]))
    writable = picture if mode not in ("CMYK", "HSV", "YCbCr") else picture.convert("RGB")
    np.testing.assert_array_equal(sent(gateway, picture), images.decode_file(lossless(writable), "file"))


def test_orientation_of_an_opened_photograph_is_applied(gateway: RecordingGateway) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    opened = Image.open(io.BytesIO(lossless(Image.fromarray(PIXELS), exif=exif)))
    np.testing.assert_array_equal(sent(gateway, opened), np.rot90(PIXELS, 3))


@pytest.mark.parametrize("array", [PIXELS[..., 0], PIXELS[..., :2], PIXELS.astype(np.float32), PIXELS[None]])
def test_an_array_that_is_no_picture_is_refused(gateway: RecordingGateway, array: np.ndarray) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidArgument, match=r"images\[1\] must be uint8"):
        client.classify([PIXELS, array])


def test_a_missing_file_is_an_os_error(gateway: RecordingGateway, tmp_path: Path) -> None:
    with Client(gateway.address) as client, pytest.raises(FileNotFoundError):
        client.embed(tmp_path / "nothing.png")


@pytest.mark.parametrize("verb", ["classify", "embed"])
def test_more_pictures_than_a_call_takes_are_told_the_way(gateway: RecordingGateway, verb: str) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidArgument, match="1 to 64 pictures; classify_stream"):
        getattr(client, verb)([png(1)] * 65)
    assert gateway.requests == []


def test_a_file_of_another_kind_is_told_by_its_path(gateway: RecordingGateway, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("milk, eggs")
    with Client(gateway.address) as client, pytest.raises(InvalidArgument) as caught:
        client.classify([png(1), tmp_path / "a.txt"])
    assert str(caught.value) == f"images[1] must be a PNG, JPEG or WebP file, got '{tmp_path}/a.txt'"


def test_a_file_that_cannot_be_read_is_told_by_its_path(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client, pytest.raises(OSError, match="/proc/self/mem"):
        client.classify("/proc/self/mem")  # its first page is never mapped


@pytest.mark.parametrize("size", [0, -1])
def test_no_size_and_no_labels_are_refused(gateway: RecordingGateway, size: int) -> None:
    with Client(gateway.address) as client:
        for options in ({"size": size}, {"top_k": size}):
            with pytest.raises(InvalidArgument, match="a whole number from 1"):
                client.classify(png(1), **options)
        with pytest.raises(InvalidArgument, match="size must be a whole number from 1"):
            client.embed(png(1), size=size)
    assert gateway.requests == []


def test_classify_answers_one_a_picture(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        answers = client.classify([png(1), PIXELS], 2, model="vit-tiny")
    shown = Classification("vit-tiny", "fake", (Prediction("cat", 0.75, 4, 2.5), Prediction("dog", 0.25, 1, 1.5)))
    assert answers == [shown, shown]
    (request,) = gateway.requests
    assert (request.top_k, request.model, len(request.images)) == (2, "vit-tiny", 2)


@pytest.mark.parametrize(
    ("pooling", "expected"), [("cls", vit_service_pb2.POOLING_CLS), ("mean", vit_service_pb2.POOLING_MEAN)]
)
def test_embed_tells_who_made_the_vectors(
    gateway: RecordingGateway, pooling: str, expected: vit_service_pb2.Pooling
) -> None:
    with Client(gateway.address) as client:
        answer = client.embed([png(1), png(2)], pooling, True, model="vit-tiny")  # type: ignore[arg-type]
    assert (answer.model, answer.backend, len(answer)) == ("vit-tiny", "fake", 2)
    vectors = answer.vectors
    np.testing.assert_array_equal(vectors, np.array([[0, 0.5], [1, 1.5]], dtype=np.float32))
    vectors += 1  # the caller's own to change
    (request,) = gateway.requests
    assert (request.pooling, request.normalize, request.model) == (expected, True, "vit-tiny")


def test_options_of_embed_reach_the_gateway(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        client.embed(png(1), dtype="int8", size=96, layers=[0, -1], attention_maps=True)
        client.embed(png(1), layers="all")
    first, second = gateway.requests
    assert (first.dtype, first.size, list(first.layers)) == (tensor_pb2.DTYPE_INT8, 96, [0, -1])
    assert (first.attention_maps, first.hidden_states, first.pooling) == (True, False, 0)
    assert (second.hidden_states, list(second.layers)) == (True, [])


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"layers": ["last"]}, {"size": -1}, {"layers": [2**31]}])
def test_options_that_no_field_can_hold_are_refused(gateway: RecordingGateway, options: dict[str, object]) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidArgument, match=next(iter(options))):
        client.embed(png(1), **options)  # type: ignore[arg-type]


def test_8_bit_vectors_are_scaled_back() -> None:
    vectors, scales = np.array([[127, -64]], np.int8), np.array([0.5], np.float32)
    np.testing.assert_array_equal(Embeddings("m", "b", vectors, scales).as_float32(), [[63.5, -32]])


def test_an_unknown_pooling_is_refused(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidArgument, match="auto, cls, mean"):
        client.embed(png(1), "max")  # type: ignore[arg-type]


def test_models_lists_models_and_who_did_not_answer(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        models = client.models()
    properties = {"width": "64", "scheduler": "DPM++ 2M", "scheduler_class": "DPMSolverMultistepScheduler"}
    assert list(models) == [Model("sd-tiny", "diffusion", "torch", "float32", "cpu", True, properties)]
    assert (len(models), models.unreachable, models.roots) == (1, ("vit",), ("/models",))
    assert gateway.requests == [pb.ListModelsRequest()]


def test_sampling_tells_schedulers_and_guiders_with_their_options(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        told = client.sampling()
    scheduler = Choice("DPM++ 2M", "DPMSolverMultistepScheduler", "", {"solver_order": 2}, {"solver_order": "1 to 3"})
    assert told == Sampling((scheduler,), (Choice("APG", "Adaptive", "turns", {}, {"eta": "0 to 1"}),))
    assert gateway.requests == [pb.DescribeSamplingRequest()]


async def test_sync_and_async_answers_are_the_same(gateway: RecordingGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        asked = await client.classify(PIXELS), await client.models(), (await client.embed(PIXELS)).vectors.tolist()
    with Client(gateway.address) as sync_client:
        sync_asked = sync_client.classify(PIXELS), sync_client.models(), sync_client.embed(PIXELS).vectors.tolist()
    assert asked == sync_asked
    assert gateway.requests[:3] == gateway.requests[3:]


def test_importing_the_client_brings_in_no_service_and_no_torch() -> None:
    code = "import sys, imagemesh_client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = ("torch", "diffusers", "transformers", "fastapi", "imagemesh_services", "imagemesh_gateway")
    assert [name for name in loaded if name.startswith(heavy)] == []
