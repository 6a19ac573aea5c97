"""The VAE service against diffusers: decode, encode, tiled, sliced, and many pictures at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from imagemesh.v1 import vae_service_pb2 as pb
from imagemesh.v1 import vae_service_pb2_grpc as rpc
from imagemesh_cli.host import MeshHost
from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.tensors import from_proto, to_proto
from tests.support.mesh import running_mesh
from tests.support.reference import worst


@pytest.fixture(scope="module")
def mesh(models: Path) -> Iterator[MeshHost]:
    with running_mesh(backend="torch", models=str(models)) as mesh:
        yield mesh


@pytest.fixture
def stub(mesh: MeshHost) -> Iterator[Any]:
    with grpc.insecure_channel(mesh.services["vae"].address, options=channel_options(64 << 20)) as channel:
        yield rpc.VaeServiceStub(channel)


@pytest.fixture(scope="module")
def vae(models: Path) -> Any:
    return AutoencoderKL.from_pretrained(models / "tiny-sd" / "vae")


def latents(count: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 4, side, side)).astype(np.float32)


def decoded(vae: Any, rows: np.ndarray) -> np.ndarray:
    """diffusers' own picture."""
    with torch.no_grad():
        pixels = vae.decode(torch.from_numpy(rows) / vae.config.scaling_factor).sample
    return ((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def decode(stub: Any, rows: np.ndarray, **memory: bool) -> np.ndarray:
    request = pb.DecodeLatentsRequest(model="tiny-sd", latents=to_proto(rows), memory=pb.VaeMemoryOptions(**memory))
    return from_proto(stub.DecodeLatents(request).images, "images", dtypes=["uint8"])


@pytest.mark.parametrize("count", [1, 3, 19])
@pytest.mark.parametrize("sliced", [False, True])
def test_decoding_equals_diffusers_sliced_or_not(stub: Any, vae: Any, count: int, sliced: bool) -> None:
    rows = latents(count)
    assert worst(decode(stub, rows, sliced=sliced), decoded(vae, rows)) <= 1


def test_tiled_decoding_equals_diffusers_tiled(stub: Any, models: Path) -> None:
    rows = latents(1, side=40)  # larger than a tile
    tiled = AutoencoderKL.from_pretrained(models / "tiny-sd" / "vae")
    tiled.enable_tiling()
    assert rows.shape[-1] > tiled.tile_latent_min_size
    assert worst(decode(stub, rows, tiled=True), decoded(tiled, rows)) <= 1
    assert worst(decode(stub, rows, tiled=True), decode(stub, rows)) > 0  # tiles are close, not equal


def test_an_option_is_forgotten_after_its_call(stub: Any, vae: Any) -> None:
    rows = latents(1, side=40)
    decode(stub, rows, tiled=True)
    assert worst(decode(stub, rows), decoded(vae, rows)) <= 1


@pytest.mark.parametrize("count", [1, 9])
def test_encoding_answers_the_posterior(stub: Any, vae: Any, count: int) -> None:
    images = np.random.default_rng(4).integers(0, 256, (count, 64, 48, 3), dtype=np.uint8)
    answer = stub.EncodeImages(pb.EncodeImagesRequest(model="tiny-sd", images=to_proto(images)))
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
    assert np.abs(from_proto(answer.mean, "mean") - posterior.mean.numpy()).max() < 1e-4
    assert np.abs(from_proto(answer.log_variance, "log_variance") - posterior.logvar.numpy()).max() < 1e-4
    assert (answer.scaling_factor, answer.backend) == (pytest.approx(vae.config.scaling_factor), "torch")


def test_latents_of_another_vae_are_refused(stub: Any) -> None:
    rows = np.zeros((1, 16, 8, 8), dtype=np.float32)
    with pytest.raises(grpc.RpcError) as caught:
        decode(stub, rows)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "latents.shape must be [any, 4, any, any]" in caught.value.details()
