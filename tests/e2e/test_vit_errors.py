"""Bad requests and bad folders get a clear error from the ViT service, and harm nothing else."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from imagemesh.v1 import image_pb2, tensor_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.limits import MAX_IMAGES
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.service import create
from tests.support.pictures import encoded, png_of_size, scene
from tests.support.services import Served, serving

GOOD = image_pb2.Image(pixels=to_proto(scene()))
PNG = encoded(scene())
VERBS = ("ClassifyImages", "EmbedImages")


@pytest.fixture(params=["fake", "torch"])
async def vit(request: pytest.FixtureRequest, models: Path) -> AsyncIterator[rpc.VitServiceStub]:
    async with serving(create, _config(models, request.param)) as served:
        yield rpc.VitServiceStub(served.channel)


@pytest.fixture
async def fake(models: Path) -> AsyncIterator[Served]:
    async with serving(create, _config(models, "fake", max_message_bytes=1 << 20)) as served:
        yield served


def _config(models: Path, backend: str, **changes: int) -> VitConfig:
    return VitConfig(listen="127.0.0.1:0", backend=backend, models=str(models), device="cpu", threads=2, **changes)


def _request(verb: str, images: list[image_pb2.Image], model: str, **fields: int):
    kind = pb.ClassifyImagesRequest if verb == "ClassifyImages" else pb.EmbedImagesRequest
    return kind(model=model, images=images, **fields)


async def _refused(stub: rpc.VitServiceStub, verb: str, images: list[image_pb2.Image], **fields: int):
    """The error that the call ends with, after showing that a good call still works on the same server."""
    model = await _model_name(stub)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, verb)(_request(verb, images, model, **fields))
    await getattr(stub, verb)(_request(verb, [GOOD], model))
    return caught.value


async def _model_name(stub: rpc.VitServiceStub) -> str:
    """The only model: the error for an unknown one lists it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ClassifyImages(pb.ClassifyImagesRequest(model="no such model", images=[GOOD]))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    return caught.value.details().rpartition("available: ")[2]


def _field(error: grpc.aio.AioRpcError) -> str:
    """The field that the error's BadRequest names."""
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    return bad.field_violations[0].field


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("count", [0, MAX_IMAGES + 1])
async def test_no_images_or_too_many_are_refused(vit, verb, count):
    error = await _refused(vit, verb, [GOOD] * count)
    assert _field(error) == "images"
    assert f"got {count}" in error.details()


BAD_FILES = {
    "truncated png": PNG[: len(PNG) // 2],
    "png header alone": PNG[:33],
    "not a picture": b"hello, I am a picture",
    "empty": b"",
    "gif, which is not served": encoded(scene(), "GIF"),
    "decompression bomb": png_of_size(50_000, 50_000),
    "20,000 x 20,000": png_of_size(20_000, 20_000),
    "truncated jpeg": encoded(scene(), "JPEG")[:-200],
    "picture just over the limit": png_of_size(8193, 8192),
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("verb", VERBS)
async def test_bad_file_is_refused_by_its_place(vit, verb, data):
    error = await _refused(vit, verb, [GOOD, image_pb2.Image(encoded=data)])
    assert _field(error) == "images[1].encoded"


BAD_PIXELS = {
    "no pixels": to_proto(np.zeros((0, 4, 3), np.uint8)),
    "four channels": to_proto(np.zeros((4, 4, 4), np.uint8)),
    "floats": to_proto(np.zeros((4, 4, 3), np.float32)),
    "too few bytes": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_UINT8, shape=[4, 4, 3], data=b"12"),
    "negative extent": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_UINT8, shape=[-4, 4, 3], data=b""),
    "overflowing shape": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_UINT8, shape=[2**62, 2**62, 3], data=b""),
}


@pytest.mark.parametrize("pixels", BAD_PIXELS.values(), ids=BAD_PIXELS)
async def test_bad_pixels_are_refused_by_their_place(vit, pixels):
    error = await _refused(vit, "ClassifyImages", [GOOD, image_pb2.Image(pixels=pixels)])
    assert _field(error).startswith("images[1].pixels")


BAD_WISHES = {
    "layer past the last": ({"layers": [0, 9]}, "layers[1]"),
    "layer before the first": ({"layers": [-9]}, "layers[0]"),
    "all layers and some": ({"hidden_states": True, "layers": [0]}, "layers"),
    "dtype of no vector": ({"dtype": tensor_pb2.DTYPE_BOOL}, "dtype"),
    "unknown dtype": ({"dtype": 99}, "dtype"),
    "size of no whole patches": ({"size": 7777}, "size"),
    "size past all": ({"size": 8 * 4096}, "size"),
}


@pytest.mark.parametrize(("fields", "field"), BAD_WISHES.values(), ids=BAD_WISHES)
async def test_what_the_model_can_not_give_is_refused_by_its_field(vit, fields, field):
    assert _field(await _refused(vit, "EmbedImages", [GOOD], **fields)) == field


async def test_unknown_pooling_is_refused(vit):
    error = await _refused(vit, "EmbedImages", [GOOD], pooling=7)
    assert _field(error) == "pooling"
    assert "POOLING_MEAN" in error.details()


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
async def test_a_threshold_that_is_no_probability_is_refused(vit, threshold):
    error = await _refused(vit, "ClassifyImages", [GOOD], threshold=threshold)
    assert _field(error) == "threshold"


async def test_hidden_states_that_would_not_fit_the_answer_are_refused_before_the_work(models):
    config = _config(models, "torch", max_message_bytes=1 << 16)  # tiny-vit's take 8704 bytes a picture
    small = image_pb2.Image(pixels=to_proto(np.zeros((2, 2, 3), np.uint8)))
    async with serving(create, config) as served:
        stub = rpc.VitServiceStub(served.channel)
        with pytest.raises(grpc.aio.AioRpcError, match="at most 7") as caught:
            await stub.EmbedImages(_request("EmbedImages", [small] * 8, "tiny-vit", hidden_states=1))
        assert _field(caught.value) == "images"
        answer = await stub.EmbedImages(_request("EmbedImages", [small] * 7, "tiny-vit", hidden_states=1))
        assert list(answer.hidden_states.shape) == [4, 7, 17, 32]


async def test_a_bad_picture_does_not_harm_its_neighbours(fake):
    stub = rpc.VitServiceStub(fake.channel)
    bad = image_pb2.Image(encoded=PNG[:100])
    calls = [stub.ClassifyImages(_request("ClassifyImages", [one], "fake")) for one in (GOOD, bad) * 8]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(one, grpc.aio.AioRpcError) for one in answers] == [False, True] * 8


async def test_fake_answers_over_the_wire_as_worked_out_by_hand(fake):
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    request = _request("EmbedImages", [image_pb2.Image(pixels=to_proto(red)), GOOD], "fake", hidden_states=1)
    answer = await rpc.VitServiceStub(fake.channel).EmbedImages(request)
    states = from_proto(answer.hidden_states, "hidden_states")
    assert states.shape == (2, 2, 2, 3)
    assert states[:, 0].tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 0, 0], [2, 0, 0]]]


async def test_black_picture_normalizes_to_zeros_not_nan(fake):
    black = image_pb2.Image(pixels=to_proto(np.zeros((4, 4, 3), np.uint8)))
    answer = await rpc.VitServiceStub(fake.channel).EmbedImages(_request("EmbedImages", [black], "fake", normalize=1))
    assert from_proto(answer.embeddings, "embeddings").tolist() == [[0, 0, 0]]


def _copy(models: Path, root: Path, file: str, **changes: object) -> None:
    folder = Path(shutil.copytree(models / "tiny-vit", root / "vit"))
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


BROKEN_FOLDERS = {
    "fewer labels than the head has rows": (
        "config.json",
        {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
        r"classifier\.bias is \[10\], where config.json asks for \[2\]",
    ),
    "labels not numbered from 0": (
        "config.json",
        {"id2label": {str(i + 1): f"l{i}" for i in range(10)}, "label2id": None},
        "id2label",
    ),
    "processor of another model": (
        "preprocessor_config.json",
        {"size": {"height": 48, "width": 48}},
        r"gives pictures of \[3, 48, 48\], its config.json wants \[3, 32, 32\]",
    ),
}


@pytest.mark.parametrize(("file", "changes", "message"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
async def test_broken_folder_is_refused_with_its_fault(models, tmp_path, file, changes, message):
    _copy(models, tmp_path, file, **changes)
    async with serving(create, _config(tmp_path, "torch")) as served:
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await rpc.VitServiceStub(served.channel).ClassifyImages(_request("ClassifyImages", [GOOD], "vit"))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("architecture", ["ViTModel", "SwinForMaskedImageModeling", None])
async def test_folder_of_another_architecture_is_not_listed(models, tmp_path, architecture):
    _copy(models, tmp_path, "config.json", architectures=architecture and [architecture])
    async with serving(create, _config(tmp_path, "torch")) as served:
        with pytest.raises(grpc.aio.AioRpcError, match="available: none") as caught:
            await rpc.VitServiceStub(served.channel).ClassifyImages(_request("ClassifyImages", [GOOD], "vit"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
