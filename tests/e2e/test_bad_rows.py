"""In torch's shared forwards a row that fails, by NaN or by an exception, or leaves, changes nobody else's picture."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagemesh_runtime.errors import NotFinite
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import BACKENDS, Residuals, Run, SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Finished, Progress
from imagemesh_services.diffusion.schedulers import find_scheduler
from tests.support.backends import load_first

SCHEDULERS = ("Euler a", "DPM++ 2M Karras", "UniPC")
NEIGHBOURS = range(len(SCHEDULERS))
BAD = 9


class Unwell(Exception):
    """What a forward raises that a row of prompts is too much for."""


@pytest.fixture(scope="module")
def model(models: Path) -> Any:
    return load_first(BACKENDS, "torch", DiffusionConfig, models)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    lane = Lane("test")
    engine = Engine(lane, Metrics("diffusion"), max_rows=16, max_queue=8)
    yield engine
    await engine.close()
    lane.close()


def inputs(seed: int, factor: float = 1.0) -> SampleInputs:
    """Three neighbours with other schedulers, and one whose prompt is ``factor`` times what it should be."""
    embeds = np.random.default_rng(seed).normal(size=(1, 5, 32)).astype(np.float32) * np.float32(factor)
    name = SCHEDULERS[seed % len(SCHEDULERS)]
    return SampleInputs({"prompt_embeds": embeds}, 64, 64, 6, 1.0, find_scheduler(name), (seed,))


async def finish(engine: Engine, model: Any, asked: SampleInputs) -> np.ndarray:
    async for event in engine.sample(model, asked):
        last = event
    assert isinstance(last, Finished)
    return last.latents


async def crowd(engine: Engine, model: Any, bad: SampleInputs) -> tuple[Sequence[np.ndarray], Any]:
    """The neighbours' latents, and how the bad one ended."""
    works = (finish(engine, model, one) for one in (*map(inputs, NEIGHBOURS), bad))
    *neighbours, ended = await asyncio.gather(*works, return_exceptions=True)
    return neighbours, ended


async def check_neighbours(engine: Engine, model: Any, found: Sequence[np.ndarray]) -> None:
    for seed in NEIGHBOURS:
        np.testing.assert_allclose(found[seed], await finish(engine, model, inputs(seed)), atol=1e-4)


async def test_a_row_of_nan_fails_alone(engine: Engine, model: Any) -> None:
    neighbours, ended = await crowd(engine, model, inputs(BAD, factor=1e38))
    assert isinstance(ended, NotFinite)
    await check_neighbours(engine, model, neighbours)


async def test_a_row_that_the_forward_cannot_bear_fails_alone(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model._forward
    sizes: list[int] = []

    def raising(sample: Any, timestep: Any, prompts: Any, *more: Any) -> Any:
        sizes.append(len(sample))
        if prompts[0].abs().max() > 100:
            raise Unwell
        return forward(sample, timestep, prompts, *more)

    monkeypatch.setattr(model, "_forward", raising)
    neighbours, ended = await crowd(engine, model, inputs(BAD, factor=1000))
    assert isinstance(ended, Unwell)
    assert max(sizes) == len(SCHEDULERS) + 1  # it was in a forward with all the others
    await check_neighbours(engine, model, neighbours)


async def test_who_is_cancelled_in_a_shared_forward_is_in_no_later_one(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = model.advance
    forwards: list[list[int]] = []

    def noting(runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Any:
        forwards.append([run._generators()[0].initial_seed() for run in runs])  # type: ignore[attr-defined]
        return advance(runs, residuals)

    monkeypatch.setattr(model, "advance", noting)
    staying = [asyncio.create_task(finish(engine, model, inputs(seed))) for seed in NEIGHBOURS]
    leaving = engine.sample(model, inputs(BAD))
    async for event in leaving:
        if isinstance(event, Progress) and event.step == 2:
            break
    before = sum(BAD in seeds for seeds in forwards)
    await leaving.aclose()
    neighbours = await asyncio.gather(*staying)
    assert sum(BAD in seeds for seeds in forwards) <= before + 1
    assert max(map(len, forwards)) == len(SCHEDULERS) + 1
    monkeypatch.undo()
    await check_neighbours(engine, model, neighbours)
