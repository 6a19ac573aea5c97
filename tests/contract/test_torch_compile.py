"""``compile``: torch's forwards made by torch.compile, and what they answer is what they answer without."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion import backend as diffusion
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.vae import backend as vae
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.config import VaeConfig
from tests.contract.test_diffusion_control import residuals
from tests.contract.test_diffusion_guiders import guided, made_inputs
from tests.support.backends import load_first, open_backend

# Of torch.compile's backends one that takes no compiler: it notes that it was asked, and runs the graph as it is.
NOTING = "noting"
made: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def noting() -> Iterator[None]:
    def run(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch._dynamo.register_backend(run, name=NOTING)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def samplers(models: Path) -> list[Any]:
    """As it is, and compiled."""
    return [
        open_backend(diffusion.BACKENDS, "torch", DiffusionConfig, models, compile=choice).load("tiny-sd")
        for choice in ("", NOTING)
    ]


def finish(model: Any, inputs: Any, steered: bool = False) -> np.ndarray:
    run = model.start(inputs)
    for step in range(run.evaluations):
        assert list(model.advance([run], [residuals(step) if steered else None])) == [None]
    latents: np.ndarray = run.latents()
    return latents


@pytest.mark.parametrize("size", [64, 96])
def test_a_compiled_sampler_draws_the_same(samplers: list[Any], size: int) -> None:
    before = len(made)
    inputs = dataclasses.replace(made_inputs("torch"), width=size, steps=3)
    plain, compiled = (finish(model, inputs) for model in samplers)
    np.testing.assert_allclose(compiled, plain, atol=1e-4)
    assert len(made) > before or size == 96, "nothing was compiled"


def test_a_guiders_own_pass_hooks_layers_that_are_not_compiled(samplers: list[Any]) -> None:
    inputs = guided(made_inputs("torch"), "pag", steps=3)
    plain, compiled = (finish(model, inputs) for model in samplers)
    np.testing.assert_allclose(compiled, plain, atol=1e-4)
    assert np.abs(plain - finish(samplers[0], dataclasses.replace(made_inputs("torch"), steps=3))).max() > 1e-2


def test_residuals_come_into_layers_that_are_not_compiled(samplers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = dataclasses.replace(made_inputs("torch"), steps=3)
    plain = finish(samplers[0], inputs, steered=True)
    monkeypatch.setattr(samplers[1], "_plain", None)  # it can't be called
    np.testing.assert_array_equal(finish(samplers[1], inputs, steered=True), plain)


def test_a_compiled_sampler_is_another_to_checkpoints(samplers: list[Any]) -> None:
    assert samplers[0].fingerprint != samplers[1].fingerprint


def test_a_compiled_vae_decodes_and_encodes_the_same(models: Path) -> None:
    plain = load_first(vae.BACKENDS, "torch", VaeConfig, models)
    before = len(made)
    compiled = open_backend(vae.BACKENDS, "torch", VaeConfig, models, compile=NOTING).load("tiny-sd")
    latents = np.random.default_rng(0).normal(size=(2, 4, 8, 16)).astype(np.float32)
    pictures = plain.decode(latents, MemoryOptions())
    assert np.abs(compiled.decode(latents, MemoryOptions()).astype(int) - pictures).max() <= 1
    np.testing.assert_allclose(
        compiled.encode(pictures, MemoryOptions()), plain.encode(pictures, MemoryOptions()), atol=1e-4
    )
    assert len(made) > before


@pytest.mark.parametrize(("table", "config"), [(vae.BACKENDS, VaeConfig), (diffusion.BACKENDS, DiffusionConfig)])
def test_a_compiler_that_torch_has_not_is_refused_with_those_it_has(table: Any, config: Any, models: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"compile must be empty or one of .*inductor.*got 'abacus'"):
        open_backend(table, "torch", config, models, compile="abacus")
