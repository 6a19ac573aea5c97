"""Weights that are missing or of the wrong shape are refused, not replaced by random ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_services.torch_support import load_module

# (library, class, folder in the pipeline, file of weights, a weight)
LIBRARIES = [
    pytest.param(AutoencoderKL, "vae", "diffusion_pytorch_model.safetensors", "quant_conv.bias", id="diffusers"),
    pytest.param(CLIPTextModel, "text_encoder", "model.safetensors", "final_layer_norm.bias", id="transformers"),
]
libraries = pytest.mark.parametrize(("cls", "part", "file", "weight"), LIBRARIES)


@pytest.fixture
def pipeline(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "tiny-sd", tmp_path / "copy"))


def _load(cls, path: Path):
    return load_module(cls, path, torch.float32, torch.device("cpu"))


def _rewrite(path: Path, weight: str, replacement: torch.Tensor | None) -> None:
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith(weight))
    if replacement is None:
        del tensors[key]
    else:
        tensors[key] = replacement
    save_file(tensors, path, metadata={"format": "pt"})


@libraries
def test_whole_weights_load_frozen_and_in_eval_mode(pipeline, cls, part, file, weight):
    module = _load(cls, pipeline / part)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@libraries
def test_missing_weight_is_named(pipeline, cls, part, file, weight):
    _rewrite(pipeline / part / file, weight, None)
    with pytest.raises(FailedPrecondition, match=rf"copy/{part}.*{weight} is missing"):
        _load(cls, pipeline / part)


@libraries
def test_weight_of_the_wrong_shape_is_named_with_both_shapes(pipeline, cls, part, file, weight):
    _rewrite(pipeline / part / file, weight, torch.zeros(3))
    with pytest.raises(FailedPrecondition, match=rf"{weight} is \[3\], where config.json asks for"):
        _load(cls, pipeline / part)


@libraries
def test_pickles_are_not_read(pipeline, cls, part, file, weight):
    weights = pipeline / part / file
    torch.save(load_file(weights), weights.with_name(file.replace("model.safetensors", "model.bin")))
    torch.save(load_file(weights), pipeline / part / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FailedPrecondition, match="no weights in safetensors"):
        _load(cls, pipeline / part)


def test_many_faults_are_cut_short(pipeline):
    config = pipeline / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 16}))
    with pytest.raises(FailedPrecondition, match=r"and \d+ more") as caught:
        _load(CLIPTextModel, pipeline / "text_encoder")
    assert len(str(caught.value)) < 600
