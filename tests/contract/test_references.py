"""What ReferenceService and the samplers promise of pictures to be like, over every backend."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as diffusion_pb
from imagemesh.v1 import diffusion_service_pb2_grpc as diffusion_rpc
from imagemesh.v1 import image_pb2
from imagemesh.v1 import reference_service_pb2 as pb
from imagemesh.v1 import reference_service_pb2_grpc as rpc
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import from_proto, map_to_proto, to_proto
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.references import read_references
from imagemesh_services.diffusion.service import create as create_diffusion
from imagemesh_services.vit.backend import BACKENDS as CLASSIFIERS
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.references.backend import BACKENDS
from imagemesh_services.vit.service import create
from tests.support.services import serving
from tests.support.tiny_adapters import build_adapters

IMAGES = np.random.default_rng(3).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def adapters(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    build_adapters(root / "IP-Adapter" / "models", models / "tiny-sd")
    (root / "IP-Adapter" / "models" / "broken.safetensors").write_bytes(b"no tensors")
    return root


@asynccontextmanager
async def service(backend: str, models: Path) -> AsyncIterator[Any]:
    config = VitConfig(
        backend=backend, models=str(models), device="cpu", threads=1, listen="127.0.0.1:0", drain_grace_seconds=0.1
    )
    async with serving(create, config) as served, grpc.aio.insecure_channel(served.server.address) as channel:
        yield rpc.ReferenceServiceStub(channel)


def asked(*images: np.ndarray, adapter: str = "") -> pb.EmbedReferencesRequest:
    pixels = [image_pb2.Image(pixels=to_proto(one)) for one in images]
    return pb.EmbedReferencesRequest(adapter=adapter, images=pixels)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_embeddings_are_a_row_a_picture_and_no_pictures_are_of_the_same_shape(
    backend: str, adapters: Path
) -> None:
    async with service(backend, adapters) as stub:
        for name in (await stub.ListAdapters(pb.ListAdaptersRequest())).adapters:
            answer = await stub.EmbedReferences(asked(*IMAGES, adapter=name))
            assert (answer.backend, answer.adapter) == (backend, name)
            found = {name: from_proto(tensor, name) for name, tensor in answer.embeds.items()}
            assert set(found) == {"image_embeds", "negative_image_embeds"}
            assert found["image_embeds"].shape == found["negative_image_embeds"].shape
            assert np.abs(found["image_embeds"][0] - found["image_embeds"][1]).max() > 1e-3


async def test_the_adapters_are_those_whose_weights_can_be_read(adapters: Path) -> None:
    async with service("torch", adapters) as stub:
        told = await stub.ListAdapters(pb.ListAdaptersRequest())
        assert list(told.adapters) == ["IP-Adapter/models/plain", "IP-Adapter/models/plus"]
        shapes = [(await stub.EmbedReferences(asked(IMAGES[0], adapter=name))).embeds for name in told.adapters]
        assert [list(one["image_embeds"].shape) for one in shapes] == [[1, 24], [1, 17, 40]]


async def test_without_adapters_references_are_not_found(models: Path) -> None:
    async with service("torch", models) as stub:
        for name in ("", "nobody"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.EmbedReferences(asked(IMAGES[0], adapter=name))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert "IP-Adapter" in caught.value.details()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
async def test_torch_embeds_references_whatever_engine_runs_the_classifiers(engine: str, adapters: Path) -> None:
    async with service(engine, adapters) as stub:
        answer = await stub.EmbedReferences(asked(IMAGES[0], adapter="IP-Adapter/models/plain"))
        assert answer.backend == "torch"


@pytest.mark.parametrize("engine", ["onnxruntime", "auto"])
async def test_without_torch_the_service_starts_and_embeds_no_references(
    engine: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "torch", BackendEntry("nowhere:Torch", library="no_such_library"))
    monkeypatch.setitem(CLASSIFIERS, "torch", BackendEntry("nowhere:Torch", library="no_such_library"))
    async with service(engine, models) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListAdapters(pb.ListAdaptersRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_what_is_no_picture_is_refused(adapters: Path) -> None:
    async with service("fake", adapters) as stub:
        for request in (asked(), asked(*[IMAGES[0]] * 9), asked(IMAGES[0][:1, :17])):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.EmbedReferences(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_fake_sampler_moves_by_the_embeddings_mean() -> None:
    config = DiffusionConfig(backend="fake", device="cpu", threads=1, listen="127.0.0.1:0", drain_grace_seconds=0.1)
    conditioning = map_to_proto({"prompt_embeds": np.zeros((1, 8, 4), np.float32)})
    told = diffusion_pb.Reference(adapter="fake", scale=0.5, embeds=embeds(np.full((1, 3), 0.5)))
    request = diffusion_pb.SampleRequest(
        model="fake", conditioning=conditioning, width=64, height=64, steps=2, guidance_scale=1, seeds=[0],
        references=[told],
    )  # fmt: skip
    async with serving(create_diffusion, config) as served, grpc.aio.insecure_channel(served.server.address) as channel:
        events = [event async for event in diffusion_rpc.DiffusionServiceStub(channel).Sample(request)]
    np.testing.assert_allclose(from_proto(events[-1].result.outputs["latents"], "latents"), 0.25)


async def test_a_checkpoint_is_of_the_adapters_weights_which_are_looked_for_beside_the_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DiffusionConfig(backend="fake", device="cpu", threads=1, listen="127.0.0.1:0", drain_grace_seconds=0.1)
    conditioning = map_to_proto({"prompt_embeds": np.zeros((1, 8, 4), np.float32)})
    request = diffusion_pb.SampleRequest(
        model="fake", conditioning=conditioning, width=64, height=64, steps=2, guidance_scale=1, seeds=[0],
        references=[diffusion_pb.Reference(adapter="fake", scale=0.5, embeds=embeds(ONE))], checkpoint_every=1,
    )  # fmt: skip
    weights, threads = ["trained once"], []

    def find(_: object, names: list[str]) -> list[str]:
        threads.append(threading.current_thread().name)
        assert names == ["fake"]
        return weights

    monkeypatch.setattr(FakeDiffusionModel, "find_adapters", find)
    async with serving(create_diffusion, config) as served, grpc.aio.insecure_channel(served.server.address) as channel:
        sample = diffusion_rpc.DiffusionServiceStub(channel).Sample
        told = [event.checkpoint async for event in sample(request) if event.HasField("checkpoint")]
        request.resume_from.CopyFrom(told[0])
        assert [event.progress.step async for event in sample(request) if event.HasField("progress")] == [2]
        weights[0] = "trained again"
        with pytest.raises(grpc.aio.AioRpcError, match=r"resume_from\.fingerprint"):
            [event async for event in sample(request)]
    assert len(threads) == 3
    assert not any("lane" in name or name == "MainThread" for name in threads)


def embeds(positive: np.ndarray, negative: np.ndarray | None = None) -> Any:
    found = {"image_embeds": positive.astype(np.float32)}
    return map_to_proto(found if negative is None else found | {"negative_image_embeds": negative.astype(np.float32)})


ONE = np.zeros((1, 3))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({"embeds": embeds(ONE, ONE), "scale": 11}, "references[0].scale"),
        ({"embeds": embeds(ONE)}, "references[0].embeds must be a map of image_embeds and negative_image_embeds"),
        ({"embeds": embeds(ONE, np.zeros((1, 4)))}, "tensors of equal shape"),
        ({"embeds": embeds(np.zeros((2, 3)), np.zeros((2, 3)))}, "[1, width] or [1, tokens, width]"),
        ({"embeds": embeds(np.full((1, 3), np.nan), ONE)}, "references[0].embeds['image_embeds']"),
    ],
)
def test_a_sampler_refuses_what_it_cannot_be_told(reference: dict[str, Any], said: str) -> None:
    request = diffusion_pb.SampleRequest(references=[diffusion_pb.Reference(**reference)])
    with pytest.raises(InvalidArgument) as caught:
        read_references(request, guided=True)
    assert said in str(caught.value)
