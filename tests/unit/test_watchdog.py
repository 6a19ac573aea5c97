"""A lane that hangs is noticed, told of, and forgiven when it goes on."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from imagemesh_runtime.errors import Hangs, Unavailable
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeRun
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Event, Finished, Terms
from imagemesh_services.diffusion.watchdog import UNMEASURED
from tests.unit.test_ticks import Gated, generation

LEAST = 0.05
MOVES, STAYS = Terms(every=100), Terms()


class Watched:
    """An engine, and what is told of its lane."""

    def __init__(self, lane: Lane, model: Gated | None = None, max_rows: int = 1) -> None:
        self.model, self.metrics = model or Gated(), Metrics("diffusion")
        self.engine = Engine(lane, self.metrics, max_rows=max_rows, max_queue=8, hang_seconds=LEAST)
        self.told: asyncio.Queue[bool] = asyncio.Queue()
        self.engine.watchdog.on_change.append(self.told.put)

    def ask(self, terms: Terms, steps: int = 5) -> "asyncio.Task[list[Event]]":
        inputs = generation(Gated(), steps).inputs

        async def follow() -> "list[Event]":
            return [event async for event in self.engine.sample(self.model, inputs, None, terms)]

        return asyncio.create_task(follow())

    async def hang(self) -> None:
        """In the third forward, when those before have told how long they take."""
        self.model.go.release(2)
        for _ in range(3):
            await self.model.wait_begun()
        assert await asyncio.wait_for(self.told.get(), 30)

    def metric(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"service": "diffusion"})


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    lane = Lane("test")
    found = Watched(lane)
    yield found
    found.model.go.release(1000)
    await found.engine.close()
    lane.close()


async def test_who_can_go_on_elsewhere_is_given_up_and_who_it_hangs_at_is_told_so(watched: Watched) -> None:
    running, waiting = watched.ask(MOVES), watched.ask(MOVES)
    await watched.hang()
    with pytest.raises(Hangs, match="hangs at this call"):
        await asyncio.wait_for(running, 30)
    with pytest.raises(Unavailable, match="its device hangs") as caught:
        await asyncio.wait_for(waiting, 30)
    assert not isinstance(caught.value, Hangs)


class Beginning(Gated):
    """Refuses to begin one of one step, and hangs at the beginning of one of two."""

    def start(self, inputs: SampleInputs) -> FakeRun:
        if inputs.steps == 1:
            raise ValueError("no such size")
        assert self.go.acquire(timeout=30)
        return super().start(inputs)


async def test_one_that_could_not_begin_is_not_taken_for_what_the_lane_hangs_at(lane_alone: Lane) -> None:
    watched = Watched(lane_alone, Beginning(), max_rows=8)
    unfit, hanging = watched.ask(MOVES, steps=1), watched.ask(MOVES, steps=2)
    assert await asyncio.wait_for(watched.told.get(), 30)
    with pytest.raises(Hangs):
        await asyncio.wait_for(hanging, 30)
    with pytest.raises(Unavailable, match="its device hangs") as caught:
        await asyncio.wait_for(unfit, 30)
    assert not isinstance(caught.value, Hangs)
    watched.model.go.release(100)
    await watched.engine.close()


async def test_while_it_hangs_nobody_is_let_in_who_can_go_elsewhere(watched: Watched) -> None:
    watched.ask(STAYS)
    await watched.hang()
    with pytest.raises(Unavailable, match="its device hangs"):
        await watched.ask(MOVES)


async def test_who_can_go_nowhere_waits_and_ends_well_when_the_lane_goes_on(watched: Watched) -> None:
    running, waiting = watched.ask(STAYS), watched.ask(STAYS)
    await watched.hang()
    assert (watched.metric("imagemesh_lane_hangs"), watched.metric("imagemesh_lane_hung_total")) == (1, 1)
    watched.model.go.release(100)
    assert not await asyncio.wait_for(watched.told.get(), 30)
    assert isinstance((await running)[-1], Finished)
    assert isinstance((await waiting)[-1], Finished)
    assert (watched.metric("imagemesh_lane_hangs"), watched.metric("imagemesh_lane_hung_total")) == (0, 1)
    watched.ask(MOVES).cancel()


async def test_a_tick_may_take_as_long_as_it_was_measured_to_take_times_a_factor(watched: Watched) -> None:
    watched.ask(STAYS)
    await watched.model.wait_begun()
    ticks, kind = watched.engine._ticks, generation(watched.model).kind
    assert ticks is not None
    assert watched.engine.watchdog.allowed(ticks) == LEAST * UNMEASURED
    for _ in range(8):
        watched.engine._pace.note(kind, 1, 3.0)
    assert watched.engine.watchdog.allowed(ticks) == pytest.approx(20 * 3.0)
    assert watched.engine.watchdog.allowed(None) == LEAST * UNMEASURED


async def test_unwatched_nothing_is_ever_too_long(lane_alone: Lane) -> None:
    model = Gated()
    engine = Engine(lane_alone, Metrics("diffusion"), max_rows=1, max_queue=8)
    events = engine.sample(model, generation(model, steps=1).inputs, None, MOVES)
    following = asyncio.create_task(anext(events))
    await model.wait_begun()
    assert engine._watching is not None
    await asyncio.wait_for(engine._watching, 30)  # it has nothing to look for
    assert not engine.watchdog.hangs
    model.go.release(1)
    await following
    await events.aclose()
    await engine.close()


@pytest.fixture
async def lane_alone() -> AsyncIterator[Lane]:
    lane = Lane("test")
    yield lane
    lane.close()
