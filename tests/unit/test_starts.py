"""Who comes in when a tick is over begins right behind it."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeRun
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Event, Finished, Started, Terms
from tests.unit.test_ticks import Gated, generation


class Starting(Gated):
    """Tells of runs that start, and may fail to start one."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = threading.Semaphore(0)
        self.unfit: Exception | None = None

    def start(self, inputs: SampleInputs) -> FakeRun:
        self.starts.release()
        if self.unfit is not None:
            raise self.unfit
        return super().start(inputs)


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    lane = Lane("test")
    yield lane
    lane.close()


@pytest.fixture
def model() -> Starting:
    return Starting()


@pytest.fixture
async def engine(lane: Lane) -> AsyncIterator[Engine]:
    engine = Engine(lane, Metrics("diffusion"), max_rows=1, max_queue=8)
    yield engine
    await engine.close()


async def ask(engine: Engine, model: Starting, steps: int = 2, *, alone: bool = False) -> list[Event]:
    inputs = generation(Gated(), steps).inputs
    return [event async for event in engine.sample(model, inputs, None, Terms(every=100, alone=alone))]


async def test_it_begins_without_the_event_loop_behind_the_last_tick_of_who_leaves(
    engine: Engine, model: Starting
) -> None:
    first, second = asyncio.create_task(ask(engine, model)), asyncio.create_task(ask(engine, model))
    await model.wait_begun()
    assert model.starts.acquire(blocking=False)
    model.go.release()
    await model.wait_begun()  # the last evaluation of the first
    assert not model.starts.acquire(blocking=False)
    await asyncio.sleep(0.05)  # the loop has heard of the evaluation before, and has nothing more to do
    model.go.release()
    assert model.starts.acquire(timeout=30)  # and meanwhile the event loop stands still
    model.go.release(2)
    for events in await asyncio.gather(first, second):
        assert [type(event) for event in events if isinstance(event, (Started, Finished))] == [Started, Finished]


async def test_who_has_gone_before_the_lane_comes_to_it_is_never_begun(engine: Engine, model: Starting) -> None:
    first, second = asyncio.create_task(ask(engine, model, steps=1)), asyncio.create_task(ask(engine, model))
    await model.wait_begun()
    assert model.starts.acquire(blocking=False)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    model.go.release()
    assert isinstance((await first)[-1], Finished)
    assert not model.starts.acquire(blocking=False)


async def test_who_has_gone_keeps_nobody_behind_from_beginning(engine: Engine, model: Starting) -> None:
    first = asyncio.create_task(ask(engine, model, steps=1))
    await model.wait_begun()
    gone, third = asyncio.create_task(ask(engine, model, alone=True)), asyncio.create_task(ask(engine, model))
    await asyncio.sleep(0)  # they have their places, and nobody has looked ahead since
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    async with asyncio.timeout(30):
        while not any(one.beginning for one in engine._waiting):
            await asyncio.sleep(0.001)
    model.go.release(10)
    assert all(isinstance(events[-1], Finished) for events in await asyncio.gather(first, third))


async def test_one_that_cannot_begin_fails_alone(engine: Engine, model: Starting) -> None:
    first, second = asyncio.create_task(ask(engine, model, steps=1)), asyncio.create_task(ask(engine, model))
    await model.wait_begun()
    model.unfit = ValueError("no such size")
    model.go.release(10)
    assert isinstance((await first)[-1], Finished)
    with pytest.raises(ValueError, match="no such size"):
        await second
    model.unfit = None
    assert isinstance((await ask(engine, model))[-1], Finished)
