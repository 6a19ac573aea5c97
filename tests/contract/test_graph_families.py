"""Graphs of every family that becomes one: what they answer is torch's, module by module."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imagemesh_services.controlnet import backend as controlnet
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.diffusion import backend as diffusion
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.text_encoder import backend as text_encoder
from imagemesh_services.text_encoder.config import TextEncoderConfig
from tests.support import tiny_models, tiny_sdxl
from tests.support.backends import open_backend

ENGINE = "onnxruntime"
ATOL = 2e-4
numbers = np.random.default_rng(0)
PICTURE = numbers.integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """SDXL's base, refiner and ControlNet, an inpainting model, ControlNets of other kinds, a T2I-Adapter; words."""
    root = tmp_path_factory.mktemp("families")
    tiny_sdxl.build_sdxl(root / "xl")
    tiny_sdxl.build_refiner(root / "refiner")
    tiny_sdxl.build_controlnet(root / "xl-control", root / "xl")
    tiny_models.build_inpainting(root / "inpainting", models / "tiny-sd")
    (root / "xl" / "embeddings").mkdir()
    vectors = {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 40)}
    save_file(vectors, root / "xl" / "embeddings" / "shiny.safetensors")
    more: Mapping[str, dict[str, Any]] = {
        "bgr": {"controlnet_conditioning_channel_order": "bgr"},
        "pooled": {"global_pool_conditions": True},
    }
    for name, settings in more.items():
        net = diffusers.ControlNetModel.from_pretrained(models / "tiny-controlnet")
        net.register_to_config(**settings)
        net.save_pretrained(root / name)
    tiny_models.build_adapter(root / "lines", 11, in_channels=1)
    tiny_sdxl.build_union(root / "union")
    return root


def both(table: Any, config: Any, root: Path, name: str) -> list[Any]:
    """The model in torch, and as a graph."""
    return [open_backend(table, backend, config, root).load(name) for backend in ("torch", ENGINE)]


@pytest.mark.parametrize("name", ["xl", "refiner"])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_text_encoders_side_by_side_or_the_second_alone(families: Path, name: str, clip_skip: int) -> None:
    ours, theirs = both(text_encoder.BACKENDS, TextEncoderConfig, families, name)
    windows = np.concatenate([ours.tokenize(text).windows for text in ("a red cat, shiny", "")])
    np.testing.assert_array_equal(theirs.tokenize("a red cat, shiny").windows, windows[:1])
    plain, graph = (model.encode(windows, clip_skip) for model in (ours, theirs))
    np.testing.assert_allclose(graph.embeds, plain.embeds, atol=ATOL)
    np.testing.assert_allclose(graph.pooled, plain.pooled, atol=ATOL)


@pytest.mark.parametrize("name", ["xl", "refiner", "inpainting"])
def test_samplers_of_other_families(families: Path, name: str) -> None:
    ours, theirs = both(diffusion.BACKENDS, DiffusionConfig, families, name)
    inputs = ours.trial(96, 64)
    told = {key: numbers.normal(size=array.shape).astype(np.float32) for key, array in inputs.conditioning.items()}
    made = []
    for model in (ours, theirs):
        run = model.start(dataclasses.replace(inputs, conditioning=told, seeds=(1, 2), steps=4))
        for _ in range(run.evaluations):
            assert list(model.advance([run], [None])) == [None]
        made.append(run.latents())
    np.testing.assert_allclose(made[1], made[0], atol=ATOL)


@pytest.mark.parametrize("name", ["xl-control", "bgr", "pooled"])
@pytest.mark.parametrize("guess", [False, True])
def test_controlnets_of_other_kinds(families: Path, name: str, guess: bool) -> None:
    ours, theirs = both(controlnet.BACKENDS, ControlNetConfig, families, name)
    inputs, sample = ours.trial(PICTURE)
    drawn = numbers.normal(size=inputs.embeddings.shape).astype(np.float32)
    inputs = dataclasses.replace(inputs, embeddings=drawn, guess=guess, scale=0.7)
    rows = numbers.normal(size=sample.shape).astype(np.float32)
    plain, graph = (controlnet.whole(model.start(inputs), rows, 321.0) for model in (ours, theirs))
    assert theirs.prompt_rows_only == ours.prompt_rows_only == (name == "pooled")
    for one, other in zip([*plain.down, plain.mid], [*graph.down, graph.mid], strict=True):
        assert one is not None
        np.testing.assert_allclose(other, one, atol=ATOL)


def test_an_adapter_that_sees_grey(families: Path) -> None:
    plain, graph = (model.features(PICTURE) for model in both(controlnet.BACKENDS, ControlNetConfig, families, "lines"))
    for one, other in zip(plain, graph, strict=True):
        np.testing.assert_allclose(other, one, atol=ATOL)


def test_what_no_graph_is_made_of_is_not_listed(families: Path) -> None:
    listed = [
        set(open_backend(controlnet.BACKENDS, name, ControlNetConfig, families).cards()) for name in ("torch", ENGINE)
    ]
    assert listed[0] - listed[1] == {"union"}
