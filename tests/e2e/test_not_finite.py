"""A model that makes NaN of finite input is named, by the service that runs it."""

import shutil
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagemesh_client import Client
from imagemesh_runtime.errors import MeshError
from tests.support.mesh import running_mesh

SPOILED = {
    "text_encoder": ("model.safetensors", "final_layer_norm.weight", "gave embeddings"),
    "unet": ("diffusion_pytorch_model.safetensors", "conv_out.weight", "gave predictions at evaluation 1 of 2"),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.conv_out.weight", "that are not finite"),
}


@pytest.mark.parametrize("part", SPOILED)
def test_nan_weights_are_told_and_another_model_serves(models: Path, tmp_path: Path, part: str) -> None:
    for name in ("good", "spoiled"):
        shutil.copytree(models / "tiny-sd", tmp_path / name)
    file, weight, said = SPOILED[part]
    path = tmp_path / "spoiled" / part / file
    weights = load_file(path)
    (key,) = [name for name in weights if name.endswith(weight)]
    save_file(weights | {key: torch.full_like(weights[key], float("nan"))}, path, metadata={"format": "pt"})
    with running_mesh(backend="torch", models=str(tmp_path)) as mesh, Client(mesh.grpc_address) as client:
        with pytest.raises(MeshError, match="model spoiled gave") as caught:
            client.generate("a cat", steps=2, scheduler="DDIM", model="spoiled")
        assert said in str(caught.value)
        assert caught.value.code is grpc.StatusCode.INTERNAL
        assert client.generate("a cat", steps=2, model="good").images
