"""What AdaptPicture promises over every backend, and what the torch one owes to diffusers."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh.v1 import diffusion_service_pb2
from imagemesh_runtime.errors import InvalidArgument, Overloaded
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels, choose_backend
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.controlnet.backend import BACKENDS
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.service import create
from imagemesh_services.controlnet.servicer import ControlNetServicer
from imagemesh_services.diffusion.features import read_features
from tests.support.services import serving
from tests.support.tiny_models import build_adapter

IMAGE = np.random.default_rng(3).integers(0, 256, (64, 128, 3), dtype=np.uint8)
NAMES = {"torch": "lines", "onnxruntime": "lines", "openvino": "lines", "fake": "fake"}


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    build_adapter(root / "lines", 31)
    (root / "tiny-controlnet").symlink_to(models / "tiny-controlnet")
    return root


@asynccontextmanager
async def service(backend: str, folder: Path) -> AsyncIterator[Any]:
    config = ControlNetConfig(
        backend=backend, models=str(folder), device="cpu", threads=1, listen="127.0.0.1:0", drain_grace_seconds=0.1
    )
    async with serving(create, config) as served:
        yield rpc.ControlNetServiceStub(served.channel)


def asked(model: str, image: np.ndarray = IMAGE) -> pb.AdaptPictureRequest:
    return pb.AdaptPictureRequest(model=model, image=to_proto(image))


@pytest.mark.parametrize("backend", BACKENDS)
async def test_features_are_one_picture_s_and_another_s_are_others(backend: str, folder: Path) -> None:
    async with service(backend, folder) as stub:
        answers = [await stub.AdaptPicture(asked(NAMES[backend], image)) for image in (IMAGE, IMAGE // 4)]
    one, other = ([from_proto(tensor, "features") for tensor in answer.features] for answer in answers)
    assert answers[0].backend == backend
    assert all(feature.shape[0] == 1 and feature.ndim == 4 for feature in one)
    assert max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)) > 1e-2


async def test_the_features_are_the_librarys(folder: Path) -> None:
    adapter = diffusers.T2IAdapter.from_pretrained(folder / "lines").eval()
    with torch.inference_mode():
        theirs = adapter(torch.from_numpy(IMAGE.astype(np.float32) / 255).permute(2, 0, 1)[None])
    async with service("torch", folder) as stub:
        answer = await stub.AdaptPicture(asked("lines"))
    for one, other in zip(answer.features, theirs, strict=True):
        np.testing.assert_allclose(from_proto(one, "features"), other.numpy(), atol=1e-5)


async def test_a_picture_beyond_the_queue_is_refused_and_its_place_is_free_again() -> None:
    config = ControlNetConfig(backend="fake", max_queue=1)
    lane, metrics = Lane("controlnet"), Metrics("controlnet")
    models = LoadedModels(choose_backend(BACKENDS, "fake")(config), lane, metrics)
    servicer = ControlNetServicer(config, models, metrics)
    begun, go = threading.Event(), threading.Event()
    try:
        blocker = asyncio.create_task(lane.run(lambda: begun.set() or go.wait(30)))
        await asyncio.to_thread(begun.wait, 30)
        first = asyncio.create_task(servicer.AdaptPicture(asked("fake"), None))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="adapt is full"):
            await servicer.AdaptPicture(asked("fake"), None)
        go.set()
        await asyncio.gather(first, blocker)
        assert (await servicer.AdaptPicture(asked("fake"), None)).features
    finally:
        go.set()
        lane.close()


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (asked("nobody"), "NOT_FOUND", "lines"),
        (asked("tiny-controlnet"), "INVALID_ARGUMENT", "a T2I-Adapter"),
        (asked("lines", IMAGE[:60]), "INVALID_ARGUMENT", "image.shape[0]"),
        (asked("lines", IMAGE.astype(np.float32)), "INVALID_ARGUMENT", "image"),
    ],
)
async def test_what_is_no_picture_or_no_adapter_is_refused(folder: Path, request_: Any, code: str, said: str) -> None:
    async with service("torch", folder) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.AdaptPicture(request_)
    assert caught.value.code() is getattr(grpc.StatusCode, code)
    assert said in caught.value.details()


async def test_a_session_takes_no_adapter(folder: Path) -> None:
    start = pb.ControlStart(units=[pb.ControlNetUnit(model="lines", image=to_proto(IMAGE), scale=1)])
    async with service("torch", folder) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [one async for one in stub.Control(iter([pb.ControlRequest(start=start)]))]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "start.units[0].model" in caught.value.details()


def features(*arrays: np.ndarray, **more: Any) -> diffusion_service_pb2.PictureFeatures:
    return diffusion_service_pb2.PictureFeatures(tensors=[to_proto(one.astype(np.float32)) for one in arrays], **more)


ONE = np.zeros((1, 8, 4, 4))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([features(ONE, scale=11)], "features[0].scale"),
        ([features(ONE, start=0.5, end=0.5)], "features[0].start"),
        ([features()], "features[0].tensors"),
        ([features(np.zeros((2, 8, 4, 4)))], "features[0].tensors[0].shape"),
        ([features(np.full_like(ONE, np.nan))], "features[0].tensors[0]"),
        ([features(ONE), features(ONE, ONE)], "features[1].tensors"),
        ([features(ONE)] * 9, "features must be 0 to 8"),
    ],
)
def test_a_sampler_refuses_features_that_cannot_be(given: list[Any], said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_features(diffusion_service_pb2.SampleRequest(features=given))
    assert said in str(caught.value)
