"""Generations whose residuals are late: parked, done again when they are there, and in nobody's way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import Residuals, Run, SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from imagemesh_services.diffusion.control import Question, Told
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Finished, Progress
from imagemesh_services.diffusion.incoming import Incoming

STEPS = 4


class Control:
    """Says that it has begun, and is done when it is let go."""

    backends = ("fake",)
    received = 0  # bytes

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()

    def at_work(self, evaluation: int, evaluations: int) -> list[int]:
        return [0]

    async def residuals(self, question: Question, incoming: Incoming, begun: Callable[[], None]) -> None:
        self.asked += 1
        begun()
        await self.go.wait()
        incoming.complete(Residuals([], np.full((1, 1, 1, 1), 0.5, np.float32)))

    @asynccontextmanager
    async def open(self, told: Told) -> AsyncIterator[Any]:
        yield self


class Counting(FakeDiffusionModel):
    def __init__(self) -> None:
        self.batches: list[int] = []

    def advance(self, runs: Sequence[Run], residuals: Sequence[Any]) -> Sequence[Exception | None]:
        self.batches.append(len(runs))
        return super().advance(runs, residuals)


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    lane = Lane("test")
    yield lane
    lane.close()


def engine_of(lane: Lane, wait: float) -> Engine:
    return Engine(lane, Metrics("diffusion"), max_rows=8, max_queue=8, control_wait=wait)


def inputs(seed: int = 1) -> SampleInputs:
    return SampleInputs({"prompt_embeds": np.ones((1, 8, 4), np.float32)}, 64, 64, STEPS, 1.0, None, (seed,))


async def finish(engine: Engine, model: FakeDiffusionModel, control: Control | None = None) -> Finished:
    last = None
    async for event in engine.sample(model, inputs(), control and control.open):
        last = event
    assert isinstance(last, Finished)
    return last


async def begins(model: Counting, making: "asyncio.Task[Finished]") -> None:
    """Wait for the first forward, which begins without residuals."""
    async with asyncio.timeout(30):
        while not model.batches:
            assert not making.done(), making.exception()
            await asyncio.sleep(0)


def stalls(engine: Engine, where: str) -> Any:
    labels = {"service": "diffusion", "where": where}
    return engine._metrics.registry.get_sample_value("imagemesh_control_stall_seconds_count", labels)


async def test_residuals_in_time_are_waited_for_within_the_forward(lane: Lane) -> None:
    engine, model, control = engine_of(lane, 60), Counting(), Control()
    making = asyncio.create_task(finish(engine, model, control))
    await begins(model, making)
    control.go.set()
    made = await asyncio.wait_for(making, 30)
    np.testing.assert_allclose(made.latents, 1.5, atol=1e-6)
    assert model.batches == [1] * STEPS
    assert control.asked == STEPS
    assert stalls(engine, "within") == stalls(engine, "before") == STEPS
    await engine.close()


async def test_a_late_row_is_done_again_when_its_residuals_are_there(lane: Lane) -> None:
    engine, model, control = engine_of(lane, 0), Counting(), Control()
    making = asyncio.create_task(finish(engine, model, control))
    async with asyncio.timeout(30):
        while not (engine._active and not engine._active[0].hasty):
            await asyncio.sleep(0)
    assert len(model.batches) == 1
    control.go.set()
    made = await asyncio.wait_for(making, 30)
    np.testing.assert_allclose(made.latents, 1.5, atol=1e-6)
    assert model.batches == [1] * (STEPS + 1)  # from then on it waits until all are there
    assert control.asked == STEPS
    await engine.close()


async def test_a_late_row_holds_nobody_back(lane: Lane) -> None:
    engine, model, control = engine_of(lane, 0), Counting(), Control()
    late = asyncio.create_task(finish(engine, model, control))
    await begins(model, late)
    quick = await asyncio.wait_for(finish(engine, model), 30)
    np.testing.assert_allclose(quick.latents, 1.0, atol=1e-6)
    assert not late.done()
    control.go.set()
    np.testing.assert_allclose((await asyncio.wait_for(late, 30)).latents, 1.5, atol=1e-6)
    await engine.close()


async def test_a_caller_who_goes_while_its_residuals_are_waited_for_frees_the_lane(lane: Lane) -> None:
    engine, model, control = engine_of(lane, 60), Counting(), Control()
    making = asyncio.create_task(finish(engine, model, control))
    await begins(model, making)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    await asyncio.wait_for(finish(engine, model), 30)
    await engine.close()


async def test_steps_without_control_are_not_asked_about(lane: Lane) -> None:
    class Idle(Control):
        def at_work(self, evaluation: int, evaluations: int) -> list[int]:
            return [0] if evaluation == 1 else []

    engine, control = engine_of(lane, 60), Idle()
    control.go.set()
    events = [event async for event in engine.sample(FakeDiffusionModel(), inputs(), control.open)]
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3, 4]
    assert control.asked == 1
    await engine.close()
