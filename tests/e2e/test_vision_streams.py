"""Long lists: one call, an answer a message, failures in their places; from the service, the gateway and the SDK."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from imagemesh.v1 import gateway_service_pb2, gateway_service_pb2_grpc, image_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_client import AsyncClient, Classification, Client, MeshError
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.service import create
from tests.support.mesh import running_mesh
from tests.support.pictures import encoded
from tests.support.services import serving

COUNT = 150  # more than a request may hold


def grey(level: int) -> np.ndarray:
    return np.full((4, 4, 3), level, np.uint8)


def image(level: int) -> image_pb2.Image:
    return image_pb2.Image(pixels=to_proto(grey(level)))


@pytest.fixture
async def vit() -> AsyncIterator[rpc.VitServiceStub]:
    config = VitConfig(listen="127.0.0.1:0", backend="fake", max_queue=4)
    async with serving(create, config) as served:
        yield rpc.VitServiceStub(served.channel)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_mesh(backend="fake") as host:
        yield host.grpc_address


async def test_each_message_is_answered_in_its_place_also_where_the_queue_is_short(vit):
    async def requests():
        for i in range(COUNT):
            asked = pb.ClassifyImagesRequest(model="fake", images=[image(i)])
            yield pb.ClassifyImageStreamRequest(request=asked)

    answers = [one async for one in vit.ClassifyImageStream(requests())]
    assert [one.index for one in answers] == list(range(COUNT))
    logits = [one.response.classifications[0].predictions[0].logit for one in answers]
    np.testing.assert_allclose(logits, np.arange(COUNT) / 255, atol=1e-6)


async def test_embeddings_stream_alike(vit):
    async def requests():
        for i in range(20):
            yield pb.EmbedImageStreamRequest(request=pb.EmbedImagesRequest(model="fake", images=[image(i), image(9)]))

    answers = [one async for one in vit.EmbedImageStream(requests())]
    vectors = np.stack([from_proto(one.response.embeddings, "embeddings") for one in answers])
    np.testing.assert_allclose(vectors[:, 0, 0], np.arange(20) / 255, atol=1e-6)
    np.testing.assert_allclose(vectors[:, 1], 9 / 255, atol=1e-6)


BAD = {
    "no pictures": (pb.ClassifyImagesRequest(model="fake"), 3, "images"),
    "torn": (pb.ClassifyImagesRequest(model="fake", images=[image_pb2.Image(encoded=b"x")]), 3, "images[0].encoded"),
    "unknown model": (pb.ClassifyImagesRequest(model="nope", images=[image(1)]), 5, "nope"),
    "threshold": (pb.ClassifyImagesRequest(model="fake", images=[image(1)], threshold=2), 3, "threshold"),
}


@pytest.mark.parametrize(("bad", "code", "said"), BAD.values(), ids=BAD)
async def test_a_bad_message_fails_alone(vit, bad, code, said):
    good = pb.ClassifyImagesRequest(model="fake", images=[image(1)])

    async def requests():
        for one in (good, bad, good):
            yield pb.ClassifyImageStreamRequest(request=one)

    answers = [one async for one in vit.ClassifyImageStream(requests())]
    assert [one.WhichOneof("outcome") for one in answers] == ["response", "error", "response"]
    assert answers[1].error.code == code
    assert said in answers[1].error.message


async def test_the_gateway_streams_what_the_service_says(address):
    async def requests():
        for i in (10, 20):
            yield gateway_service_pb2.EmbedStreamRequest(request=gateway_service_pb2.EmbedRequest(images=[image(i)]))

    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        answers = [one.response async for one in stub.EmbedStream(requests())]
    rows = [from_proto(one.embeddings, "embeddings")[0, 0] for one in answers]
    np.testing.assert_allclose(rows, [10 / 255, 20 / 255], atol=1e-6)


async def test_the_sdk_streams_a_generator_and_hands_each_failure_over_in_its_place(address):
    pictures = (b"torn" if i == 70 else grey(i) for i in range(COUNT))
    async with AsyncClient(address) as client:
        found = [one async for one in client.classify_stream(pictures, top_k=1)]
    assert len(found) == COUNT
    assert isinstance(found[70], MeshError)
    assert found[70].code is grpc.StatusCode.INVALID_ARGUMENT
    good = [one for one in found if isinstance(one, Classification)]
    levels = [i for i in range(COUNT) if i != 70]
    np.testing.assert_allclose([one.predictions[0].logit for one in good], np.array(levels) / 255, atol=1e-6)


def test_a_file_that_is_not_there_ends_the_list_after_those_before_it(address, tmp_path: Path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(grey(7)))
    found = []
    with Client(address) as client:
        stream = client.classify_stream([file, file, tmp_path / "nowhere.png", file])
        found += [next(stream), next(stream)]
        with pytest.raises(FileNotFoundError):
            next(stream)
    assert all(isinstance(one, Classification) for one in found)


def test_leaving_early_leaves_the_mesh_well(address):
    with Client(address) as client:
        stream = client.classify_stream(grey(i % 256) for i in range(10_000))
        next(stream)
        stream.close()
        assert len(client.classify(grey(1))) == 1
