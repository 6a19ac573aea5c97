"""Residuals that come while the model runs: the same bits as if they had been there, and nobody waits for ever."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagemesh_services.diffusion.backend import BACKENDS, DiffusionModel, Late, Residuals, Run, SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.incoming import Incoming
from tests.contract.test_diffusion_guiders import CASES, guided, made_inputs
from tests.support.backends import load_first

# In the shapes of tiny-sd's UNet; the fake takes any.
DOWN, MID = [(32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4)], (64, 4, 4)
PICTURES = 2


@pytest.fixture(params=BACKENDS, scope="module")
def any_model(request: pytest.FixtureRequest, models: Path) -> tuple[str, DiffusionModel]:
    return request.param, load_first(BACKENDS, request.param, DiffusionConfig, models)


@pytest.fixture(scope="module")
def torch_model(models: Path) -> Any:
    return load_first(BACKENDS, "torch", DiffusionConfig, models)


def asked(backend: str, seed: int = 7) -> SampleInputs:
    return dataclasses.replace(made_inputs(backend), seeds=(seed, seed + 1))


def residuals(step: int, rows: int = 2 * PICTURES) -> Residuals:
    numbers = np.random.default_rng(step)
    down = [numbers.normal(size=(2 * PICTURES, *shape)).astype(np.float32)[-rows:] / 8 for shape in DOWN]
    return Residuals(down, numbers.normal(size=(2 * PICTURES, *MID)).astype(np.float32)[-rows:] / 8)


def come(step: int) -> Incoming:
    incoming = Incoming()
    incoming.complete(residuals(step))
    return incoming


def finish(model: DiffusionModel, run: Run, of: Any = residuals) -> np.ndarray:
    for step in range(run.evaluations):
        assert list(model.advance([run], [of(step)])) == [None]
    return run.latents()


def test_what_came_piece_by_piece_is_as_what_was_there(any_model):
    backend, model = any_model
    whole, plain = (finish(model, model.start(asked(backend)), of) for of in (residuals, lambda step: None))
    np.testing.assert_array_equal(finish(model, model.start(asked(backend)), come), whole)
    assert np.abs(whole - plain).max() > 1e-3


def test_those_of_several_services_are_added_by_the_model_in_their_order(any_model):
    """In half precision, where the order of three tells; as they come in a message, not to be written."""
    backend, model = any_model

    def parts(step: int) -> list[Residuals]:
        found = []
        for i in range(3):
            wide = residuals(10 * step + i)
            half = [(one * 10**i).astype(np.float16) for one in (*wide.down, wide.mid)]
            for one in half:
                one.flags.writeable = False
            found.append(Residuals(half[:-1], half[-1]))
        return found

    def added(step: int) -> Residuals:
        one, other, third = parts(step)
        down = [a + b + c for a, b, c in zip(one.down, other.down, third.down, strict=True)]
        return Residuals(down, one.mid + other.mid + third.mid)

    def come_apart(step: int) -> Incoming:
        incoming = Incoming(model.plus)
        incoming.complete(*parts(step))
        return incoming

    whole = finish(model, model.start(asked(backend)), added)
    np.testing.assert_array_equal(finish(model, model.start(asked(backend)), come_apart), whole)


def test_a_run_whose_residuals_are_late_is_where_it_was(any_model):
    backend, model = any_model
    run = model.start(asked(backend))
    for step in range(run.evaluations):
        incoming = Incoming()
        (fault,) = model.advance([run], [incoming])
        assert isinstance(fault, Late)
        incoming.complete(residuals(step))
        assert list(model.advance([run], [incoming])) == [None]
    np.testing.assert_array_equal(run.latents(), finish(model, model.start(asked(backend))))


def test_a_late_run_harms_none_that_shares_its_forward(any_model):
    backend, model = any_model
    runs = [model.start(asked(backend, seed)) for seed in (1, 2, 3)]
    faults = model.advance(runs, [come(0), Incoming(), None])
    assert [type(fault) for fault in faults] == [type(None), Late, type(None)]
    for i, done, of in ((0, 1, residuals), (1, 0, residuals), (2, 1, lambda step: None)):
        for step in range(done, runs[i].evaluations):
            assert list(model.advance([runs[i]], [of(step)])) == [None]
        wanted = finish(model, model.start(asked(backend, i + 1)), of)
        np.testing.assert_allclose(runs[i].latents(), wanted, atol=2e-3)


def test_rows_that_residuals_lack_get_nothing(any_model):
    """As in guess mode, where the negative prompt's have none."""
    backend, model = any_model
    run, other = model.start(asked(backend)), model.start(asked(backend))
    half = residuals(0, PICTURES)
    zeros = [np.concatenate([np.zeros_like(one), one]) for one in (*half.down, half.mid)]
    assert list(model.advance([run], [half])) == [None]
    if backend != "fake":  # which takes the mean of all rows
        assert list(model.advance([other], [Residuals(zeros[:-1], zeros[-1])])) == [None]
        np.testing.assert_array_equal(run.latents(), other.latents())


@pytest.mark.parametrize("case", CASES)
def test_torch_takes_late_residuals_whatever_the_guider(torch_model, case):
    """Guiders remember things, and make passes of their own."""
    inputs = guided(made_inputs("torch"), case)
    rows = inputs.rows

    def of(step: int) -> Residuals:
        return Residuals([one[:rows] for one in residuals(step).down], residuals(step).mid[:rows])

    run = torch_model.start(inputs)
    for step in range(run.evaluations):
        incoming = Incoming()
        assert isinstance(torch_model.advance([run], [incoming])[0], Late)
        incoming.complete(of(step))
        assert list(torch_model.advance([run], [incoming])) == [None]
    np.testing.assert_array_equal(run.latents(), finish(torch_model, torch_model.start(inputs), of))


def test_torch_asks_for_residuals_when_the_middle_block_is_done(torch_model):
    events: list[str] = []

    class Watched(Residuals):
        @property
        def mid(self) -> Any:
            events.append("read")
            return residuals(0).mid

        @property
        def down(self) -> Any:
            events.append("read")
            return residuals(0).down

    unet = torch_model._unet
    parts = {"down": unet.down_blocks[-1], "middle": unet.mid_block, "up": unet.up_blocks[0]}
    hooks = [
        part.register_forward_hook(lambda *given, name=name: events.append(name), with_kwargs=True)
        for name, part in parts.items()
    ]
    steering = Watched.__new__(Watched)
    torch_model.advance([torch_model.start(asked("torch"))], [steering])
    for hook in hooks:
        hook.remove()
    assert [name for name in events if name != "read"] == ["down", "middle", "up"]
    assert events.index("read") == events.index("middle") + 1


@torch.inference_mode()
def test_torch_gives_the_bits_of_the_unet_that_is_given_all_residuals(torch_model, monkeypatch):
    """The library's own way: as arguments of the forward."""
    unet, calls = torch_model._unet, []
    forward = unet.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        calls.append((args, kwargs, found[0]))
        return found

    monkeypatch.setattr(unet, "forward", noting)
    torch_model.advance([torch_model.start(asked("torch"))], [residuals(0)])
    monkeypatch.undo()
    ((args, kwargs, ours),) = calls
    given = residuals(0)
    theirs = unet(
        *args, **kwargs, down_block_additional_residuals=[torch.tensor(one) for one in given.down],
        mid_block_additional_residual=torch.tensor(given.mid),
    )[0]  # fmt: skip
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wrong", ["few", "many", "rows", "shape"])
def test_torch_says_that_residuals_do_not_fit(torch_model, wrong):
    right = residuals(0)
    given = {
        "few": Residuals(right.down[1:], right.mid),
        "many": Residuals([*right.down, right.down[0]], right.mid),
        "rows": Residuals([one[:3] for one in right.down], right.mid[:3]),
        "shape": Residuals(right.down[::-1], right.mid),
    }[wrong]
    run = torch_model.start(asked("torch"))
    (fault,) = torch_model.advance([run], [given])
    assert "the ControlNet's residuals don't fit the model" in str(fault)
    assert list(torch_model.advance([run], [right])) == [None]
