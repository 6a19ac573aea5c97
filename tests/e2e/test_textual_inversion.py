"""Textual inversions in a model repository give what the library's load_textual_inversion gives."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagemesh_client import Client
from imagemesh_runtime.errors import MeshError
from tests.support import tiny_sdxl
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_models import build_models

WIDTHS = {"clip_l": 32, "clip_g": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sd with "toy" (one vector, as diffusers saves it) of its own; "wizstyle" (three, as AUTOMATIC1111 does) and
    "both" (a pair, for tiny-sdxl) for all; and files that can't be used."""
    root = build_models(tmp_path_factory.mktemp("inversions"))
    tiny_sdxl.build_sdxl(root / "tiny-sdxl")
    generator = torch.Generator().manual_seed(0)

    def write(path: Path, **shapes: tuple[int, ...]) -> None:
        path.parent.mkdir(exist_ok=True)
        save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)

    write(root / "tiny-sd" / "embeddings" / "toy.safetensors", **{"<anything>": (32,)})
    write(root / "embeddings" / "wizstyle.safetensors", emb_params=(3, 32))
    write(root / "embeddings" / "both.safetensors", clip_l=(2, 32), clip_g=(2, 40))
    write(root / "embeddings" / "wide.safetensors", emb_params=(1, 16))
    (root / "embeddings" / "old.pt").write_bytes(b"\x80\x04.")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


@cache
def reference(folder: Path, model: str) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / model)
    pipe.set_progress_bar_config(disable=True)
    if model == "tiny-sd":
        pipe.load_textual_inversion(
            str(folder / model / "embeddings"), weight_name="toy.safetensors", token="toy", use_safetensors=True
        )
        pipe.load_textual_inversion(
            str(folder / "embeddings"), weight_name="wizstyle.safetensors", token="wizstyle", use_safetensors=True
        )
        return pipe
    held = load_file(folder / "embeddings" / "both.safetensors")
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {name: getattr(pipe, f"{name}{suffix}") for name in ("tokenizer", "text_encoder")}
        pipe.load_textual_inversion({"both": held[key]}, token="both", **parts)
    return pipe


def draw(folder: Path, model: str, prompt: str, negative: str) -> np.ndarray:
    pipe = reference(folder, model)
    made = pipe(
        prompt, negative_prompt=negative, generator=torch.Generator("cpu").manual_seed(3), num_inference_steps=4,
        guidance_scale=6, output_type="np",
    ).images[0]  # fmt: skip
    return np.asarray((made * 255).round(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("model", "prompt", "negative"),
    [
        ("tiny-sd", "a red toy on the water", ""),
        ("tiny-sd", "a fox, wizstyle", "toy"),
        ("tiny-sd", "toy toy in wizstyle and the sea", "blue, wizstyle"),
        ("tiny-sdxl", "a fox, both of them", "the both"),
    ],
)
def test_words_are_the_librarys(client: Client, folder: Path, model: str, prompt: str, negative: str) -> None:
    options = {"model": model, "steps": 4, "guidance": 6, "seed": 3}
    ours = client.generate(prompt, negative_prompt=negative, **options).images[0].to_pil()  # type: ignore[arg-type]
    assert worst(ours, draw(folder, model, prompt, negative)) <= 1
    without = re.sub("toy|wizstyle|both", "dog", prompt)
    plain = client.generate(without, negative_prompt=negative, **options)  # type: ignore[arg-type]
    assert worst(ours, plain.images[0].to_pil()) > 1


def test_words_have_weights_too(client: Client) -> None:
    options = {"model": "tiny-sd", "steps": 4, "seed": 3}
    weighed, plain = (client.generate(one, **options) for one in ("a (wizstyle:1.5)", "a wizstyle"))  # type: ignore[arg-type]
    assert worst(weighed.images[0].to_pil(), plain.images[0].to_pil()) > 1


def test_a_model_s_words_are_listed(client: Client) -> None:
    encoders = [model for model in client.models().models if model.role == "text-encoder"]
    listed = {model.name: model.properties.get("embeddings") for model in encoders}
    assert listed == {"tiny-sd": "both, toy, wizstyle", "tiny-sdxl": "both"}


@pytest.mark.parametrize(
    ("model", "prompt", "why"),
    [
        ("tiny-sd", "a wide cat", "emb_params is 16 wide, the encoder 32, got .*the embedding 'wide'"),
        ("tiny-sdxl", "(wizstyle:1.2)", "made for one encoder, and the model has 2"),
        ("tiny-sd", "old", "old.pt is no safetensors file"),
    ],
)
def test_a_word_that_can_not_be_had_is_named_with_why(client: Client, model: str, prompt: str, why: str) -> None:
    with pytest.raises(MeshError, match="prompt must be a prompt without it") as caught:
        client.generate(prompt, model=model, steps=2)
    assert re.search(why, str(caught.value))


def test_it_is_the_word_alone_that_is_refused(client: Client) -> None:
    assert client.generate("a widest fold", model="tiny-sd", steps=2).images
