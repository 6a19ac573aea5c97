"""Bad input gets a clear error of the right code that names the field, and harms nothing else."""

import io
import struct
import zlib
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from imagemesh.v1 import (
    diffusion_service_pb2,
    diffusion_service_pb2_grpc,
    gateway_service_pb2_grpc,
    tensor_pb2,
    vae_service_pb2,
    vae_service_pb2_grpc,
)
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_cli.host import MeshHost
from imagemesh_client import AsyncClient, Client, Control
from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.tensors import to_proto
from tests.support.mesh import running_mesh

MIB = 1 << 20


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshHost]:
    with running_mesh(backend="fake", max_message_bytes=str(4 * MIB)) as mesh:
        yield mesh


@pytest.fixture
def client(mesh: MeshHost) -> Iterator[Client]:
    """A client that finds, after each test, that the mesh still draws."""
    with Client(mesh.grpc_address, max_message_bytes=64 * MIB) as client:
        yield client
        assert client.generate("ok", seed=1, steps=2).images[0].png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"steps": 0}, "INVALID_ARGUMENT", "steps must be 1 to 1000, got 0"),
        ({"steps": 10_001}, "INVALID_ARGUMENT", "steps must be 1 to 1000, got 10001"),
        ({"width": 65}, "INVALID_ARGUMENT", "width must be a multiple of 8 from 8 to 4096, got 65"),
        ({"height": 4104}, "INVALID_ARGUMENT", "height must be a multiple of 8 from 8 to 4096, got 4104"),
        ({"guidance": float("nan")}, "INVALID_ARGUMENT", "guidance_scale must be 0 to 100.0, got nan"),
        ({"guidance": -1.0}, "INVALID_ARGUMENT", "guidance_scale must be 0 to 100.0"),
        ({"n": 65}, "INVALID_ARGUMENT", "num_images must be 1 to 64, got 65"),
        ({"n": 0}, "INVALID_ARGUMENT", "num_images must be 1 to 64, got 0"),
        (
            {"n": 8, "width": 4096, "height": 4096},
            "INVALID_ARGUMENT",
            "num_images must be at most 67108864 pixels in all",
        ),
        ({"seed": 2**63}, "INVALID_ARGUMENT", "seed must be 0 to"),
        ({"clip_skip": 3}, "INVALID_ARGUMENT", "clip_skip must be 0 to 2, got 3"),
        ({"scheduler": "Eular"}, "NOT_FOUND", "scheduler 'Eular' not found, perhaps 'Euler'; available: DDIM"),
        ({"model": "dreams"}, "NOT_FOUND", "model 'dreams' not found; available: fake"),
        ({"model": "../../etc"}, "NOT_FOUND", "available: fake"),
        ({"negative_prompt": "x" * 100_000}, "INVALID_ARGUMENT", "negative_prompt must be at most 10000 characters"),
    ],
)
def test_a_bad_parameter_is_named(client: Client, options: dict[str, object], code: str, said: str) -> None:
    with pytest.raises(MeshError) as caught:
        client.generate("x", **options)  # type: ignore[arg-type]
    assert caught.value.code.name == code
    assert said in str(caught.value)


def test_a_prompt_of_100_000_characters_is_refused(client: Client) -> None:
    with pytest.raises(MeshError, match="prompt must be at most 10000 characters, got '100000 characters'") as caught:
        client.generate("x" * 100_000)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GIF89a not a png", "images[0].encoded must be a whole PNG, JPEG, WEBP file"),
        (png_header(64, 64), "images[0].encoded must be a whole PNG, JPEG, WEBP file"),
        (png_header(10_000, 9_000), "images[0].encoded must be at most 67108864 pixels, got '10000x9000 pixels'"),
        (png_header(50_000, 50_000), "images[0].encoded must be at most 67108864 pixels, got 'a decompression bomb'"),
        (b"", "images[0].encoded must be a whole PNG, JPEG, WEBP file"),
    ],
    ids=["no picture", "torn", "too large", "decompression bomb", "empty"],
)
def test_a_file_that_is_no_picture_is_named(client: Client, data: bytes, said: str) -> None:
    with pytest.raises(MeshError) as caught:
        client.classify(data)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in str(caught.value)


@pytest.mark.parametrize("data", [b"GIF89a not a png", png_header(64, 64), b""], ids=["no picture", "torn", "empty"])
def test_a_control_picture_that_is_none_is_named(client: Client, data: bytes) -> None:
    whole = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(MeshError) as caught:
        client.generate("x", controls=[Control(whole), Control(data)])
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "controls[1].image.encoded must be a whole PNG, JPEG, WEBP file" in str(caught.value)
    (detail,) = caught.value.details()
    assert detail.field_violations[0].field == "controls[1].image.encoded"  # type: ignore[attr-defined]


def test_a_message_over_the_limit_is_refused(client: Client) -> None:
    with pytest.raises(MeshError) as caught:
        client.classify(io.BytesIO(b"\0" * (5 * MIB)).getvalue())
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def tensor(array: np.ndarray, **changes: object) -> tensor_pb2.Tensor:
    changed = to_proto(array)
    for name, value in changes.items():
        if name == "shape":
            del changed.shape[:]
            changed.shape.extend(value)  # type: ignore[arg-type]
        else:
            setattr(changed, name, value)
    return changed


LATENTS = np.zeros((1, 4, 8, 8), dtype=np.float32)
NAN = np.full_like(LATENTS, np.nan)


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        (tensor(LATENTS, data=b"123"), "latents.data must be 1024 bytes for shape [1, 4, 8, 8] of float32"),
        (tensor(LATENTS, shape=[1, 4, -8, 8]), "latents.shape must be without negative extents"),
        (tensor(LATENTS, shape=[2**31, 4, 2**31, 2**31]), "latents.shape must be of a size that fits in memory"),
        (tensor(LATENTS, shape=[1, 4, 64]), "latents.shape must be [any, 4, any, any]"),
        (tensor(LATENTS.astype(np.int32)), "latents.dtype must be one of bfloat16, float16, float32"),
        (tensor(LATENTS, dtype=99), "latents.dtype must be one of"),
        (tensor(NAN), "latents must be finite, got '256 of 256 elements NaN or infinite'"),
        (tensor_pb2.Tensor(), "latents.dtype must be one of"),
    ],
    ids=["bytes", "negative", "overflow", "rank", "dtype", "unknown dtype", "NaN", "nothing"],
)
def test_a_bad_tensor_is_named_by_the_service(
    mesh: MeshHost, client: Client, latents: tensor_pb2.Tensor, said: str
) -> None:
    request = vae_service_pb2.DecodeLatentsRequest(model="fake", latents=latents)
    with grpc.insecure_channel(mesh.services["vae"].address) as channel:
        stub = vae_service_pb2_grpc.VaeServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.DecodeLatents(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()


def test_nan_embeddings_are_refused_by_the_sampler(mesh: MeshHost, client: Client) -> None:
    embeds = to_proto(np.full((1, 8, 4), np.nan, dtype=np.float32))
    request = diffusion_service_pb2.SampleRequest(
        model="fake", conditioning={"prompt_embeds": embeds}, width=64, height=64, steps=2, seeds=[1]
    )
    with grpc.insecure_channel(mesh.services["diffusion"].address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(diffusion_service_pb2_grpc.DiffusionServiceStub(channel).Sample(request))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "conditioning['prompt_embeds'] must be finite" in caught.value.details()


async def test_a_bad_request_does_not_disturb_its_neighbours(mesh: MeshHost, client: Client) -> None:
    async with AsyncClient(mesh.grpc_address) as neighbour:
        alone = await neighbour.generate("hi", seed=5, steps=30)
        events = neighbour.stream("hi", seed=5, steps=30)
        await anext(events)
        with pytest.raises(MeshError):
            await neighbour.generate("x", steps=0)
        last = [event async for event in events][-1]
    assert last.generation.images == alone.images  # type: ignore[union-attr]


async def test_an_unknown_field_of_the_protocol_is_ignored_and_an_empty_request_draws(mesh: MeshHost) -> None:
    async with grpc.aio.insecure_channel(mesh.grpc_address, options=channel_options(4 * MIB)) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        request = pb.GenerateRequest.FromString(b"\xf8\x3f\x01")  # field 1023
        kinds = [event.WhichOneof("event") async for event in stub.Generate(request)]
    assert kinds[-1] == "result"


def test_details_of_a_remote_error_are_unpacked(client: Client) -> None:
    with pytest.raises(MeshError) as caught:
        client.generate("x", clip_skip=9)
    (detail,) = caught.value.details()
    assert detail.field_violations[0].field == "clip_skip"  # type: ignore[attr-defined]
