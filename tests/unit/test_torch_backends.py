"""What torch backends list, and that NaN is never an answer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from imagemesh_runtime.errors import NotFinite
from imagemesh_services.text_encoder import backend as text_encoder
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.vae import backend as vae
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vit import backend as vit
from imagemesh_services.vit.config import VitConfig
from tests.support.backends import load_first, open_backend

ROOMS = {
    "text-encoder": (text_encoder.BACKENDS, TextEncoderConfig),
    "vae": (vae.BACKENDS, VaeConfig),
    "vit": (vit.BACKENDS, VitConfig),
}


def put(root: Path, name: str, marker: str, content: object) -> None:
    (root / name).mkdir()
    (root / name / marker).write_text(json.dumps(content))


def listed(room: str, root: Path) -> list[str]:
    table, config = ROOMS[room]
    return sorted(open_backend(table, "torch", config, root).cards())


def pipeline(**changes: object) -> dict[str, object]:
    """A model_index.json of Stable Diffusion 1.5's kind."""
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {**parts, **changes}


@pytest.mark.parametrize(
    ("changes", "as_text_encoder", "as_vae"),
    [
        ({}, True, True),
        ({"tokenizer": ["transformers", "CLIPTokenizerFast"]}, True, True),
        ({"tokenizer": ["transformers", "T5Tokenizer"]}, False, True),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, False, True),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, True, False),
        ({"vae": [None, None], "text_encoder": [None, None]}, False, False),
    ],
)
def test_only_what_can_be_run_is_listed(
    tmp_path: Path, changes: dict[str, object], as_text_encoder: bool, as_vae: bool
) -> None:
    put(tmp_path, "sd", "model_index.json", pipeline(**changes))
    assert listed("text-encoder", tmp_path) == ["sd"] * as_text_encoder
    assert listed("vae", tmp_path) == ["sd"] * as_vae


BROKEN = {
    "text-encoder": ("model_index.json", pipeline(text_encoder=["transformers"])),
    "vae": ("model_index.json", pipeline(vae=["diffusers"])),
    "vit": ("config.json", {"architectures": ["ViTForImageClassification"], "id2label": 10}),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_broken_folder_hides_no_other_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: str
) -> None:
    put(tmp_path, "good-sd", "model_index.json", pipeline())
    put(tmp_path, "good-vit", "config.json", {"architectures": ["ViTForImageClassification"], "id2label": {"0": "a"}})
    put(tmp_path, "broken", *BROKEN[room])
    assert listed(room, tmp_path) == ["good-vit" if room == "vit" else "good-sd"]
    (record,) = (record for record in caplog.records if record.name == "imagemesh_runtime.registry")
    assert "broken" in record.getMessage()


def poisoned(models: Path, root: Path, weight: str) -> Path:
    """A copy of the models whose VAE has NaN in a weight."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "tiny-sd", root / "tiny-sd")
    (file,) = (root / "tiny-sd" / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights[weight] = torch.full_like(weights[weight], float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    return root


@pytest.mark.parametrize("memory", [MemoryOptions(), MemoryOptions(tiled=True, sliced=True)])
def test_pixels_that_are_not_finite_are_an_error_and_no_black_picture(
    models: Path, tmp_path: Path, memory: MemoryOptions
) -> None:
    model = load_first(vae.BACKENDS, "torch", VaeConfig, poisoned(models, tmp_path, "decoder.conv_out.bias"))
    with pytest.raises(NotFinite, match="model tiny-sd gave pixels that are not finite"):
        model.decode(np.zeros((2, 4, 8, 8), np.float32), memory)


def test_latents_that_are_not_finite_are_an_error(models: Path, tmp_path: Path) -> None:
    model = load_first(vae.BACKENDS, "torch", VaeConfig, poisoned(models, tmp_path, "encoder.conv_out.bias"))
    with pytest.raises(NotFinite, match="model tiny-sd gave latents that are not finite"):
        model.encode(np.zeros((1, 64, 64, 3), np.uint8), MemoryOptions())
