"""The lane goes on by itself as long as nothing changes, and no further."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from imagemesh_runtime.errors import Unavailable
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import Residuals, Run, SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Finished, Frozen, Generation, Progress, Terms
from imagemesh_services.diffusion.ticks import Tick, Ticks


class Gated(FakeDiffusionModel):
    """Says when a forward has begun, and ends it when it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.fault: Exception | None = None

    def advance(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Sequence[Exception | None]:
        self.begun.release()
        assert self.go.acquire(timeout=30)
        return [self.fault] * len(runs) if self.fault else super().advance(runs, residuals)

    async def wait_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=30)


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    lane = Lane("test")
    yield lane
    lane.close()


@pytest.fixture
def model() -> Gated:
    return Gated()


def generation(model: Gated, steps: int = 10, terms: Terms | None = None) -> Generation:
    embeds = np.ones((1, 8, 4), dtype=np.float32)
    inputs = SampleInputs({"prompt_embeds": embeds}, 64, 64, steps, 1.0, None, (1,))
    started = Generation(model, inputs, None, terms or Terms())
    started.run = started.begin()
    return started


async def told(ticks: Ticks) -> Tick:
    tick = await asyncio.wait_for(ticks.next(), 30)
    assert tick is not None
    return tick


async def test_the_lane_is_one_tick_ahead_of_what_was_told_and_no_more(lane: Lane, model: Gated) -> None:
    one = generation(model)
    model.go.release(100)
    ticks = Ticks(lane, [one], chained=True)
    for _ in range(2):
        await model.wait_begun()
    await lane.run(lambda: None)
    assert one.evaluated == 2
    first, second = await told(ticks), await told(ticks)
    assert (first.more, second.more) == (True, False)
    assert [event for tick in (first, second) for event in tick.outcomes[0].events] == [Progress(1), Progress(2)]


async def test_told_in_time_it_goes_on_to_the_last_evaluation(lane: Lane, model: Gated) -> None:
    one = generation(model, steps=4, terms=Terms(preview_every=3))
    ticks, events = Ticks(lane, [one], chained=True), []
    for i in range(4):
        model.go.release()
        tick = await told(ticks)
        assert tick.more == (i < 3)
        events += tick.outcomes[0].events
    assert [type(event) for event in events] == [Progress, Progress, Progress, Progress, Finished]
    assert [event.preview is not None for event in events if isinstance(event, Progress)] == [False, False, True, False]
    assert one.done


async def test_a_checkpoint_is_told_before_the_next_evaluation_begins(lane: Lane, model: Gated) -> None:
    one = generation(model, steps=4, terms=Terms(every=2))
    ticks = Ticks(lane, [one], chained=True)
    model.go.release(100)
    assert (await told(ticks)).more
    second = await told(ticks)
    assert [type(event) for event in second.outcomes[0].events] == [Progress, Frozen]
    assert not second.more
    await lane.run(lambda: None)
    assert one.evaluated == 2


async def test_after_a_change_only_the_tick_under_way_is_done(lane: Lane, model: Gated) -> None:
    one = generation(model)
    ticks = Ticks(lane, [one], chained=True)
    await model.wait_begun()
    ticks.halt()
    model.go.release(100)
    assert not (await told(ticks)).more
    await lane.run(lambda: None)
    assert one.evaluated == 1


async def test_a_tick_that_waits_for_its_turn_is_not_begun_after_a_change(lane: Lane, model: Gated) -> None:
    one, free = generation(model), threading.Event()
    ticks = Ticks(lane, [one], chained=True)
    await model.wait_begun()
    other = asyncio.create_task(lane.run(free.wait, 30))
    await asyncio.sleep(0)
    model.go.release(100)
    assert (await told(ticks)).more
    ticks.halt()
    free.set()
    assert await other
    assert await asyncio.wait_for(ticks.next(), 30) is None
    assert one.evaluated == 1


async def test_other_work_of_the_lane_has_its_turn_between_two_ticks(lane: Lane, model: Gated) -> None:
    one = generation(model)
    ticks = Ticks(lane, [one], chained=True)
    await model.wait_begun()
    other = asyncio.create_task(lane.run(lambda: one.evaluated))
    await asyncio.sleep(0)
    model.go.release(100)
    assert (await told(ticks)).more
    assert await other == 1
    ticks.halt()


async def test_generations_that_part_ways_at_a_step_do_not_go_on_together(lane: Lane, model: Gated) -> None:
    both = [generation(model), generation(model)]
    ticks = Ticks(lane, both, chained=True)
    await model.wait_begun()
    both[1].started.key = "another"
    model.go.release(100)
    assert not (await told(ticks)).more


async def test_a_fault_is_told_before_anything_else_is_begun(lane: Lane, model: Gated) -> None:
    both = [generation(model), generation(model)]
    model.fault = FloatingPointError("NaN")
    ticks = Ticks(lane, both, chained=True)
    model.go.release(100)
    tick = await told(ticks)
    assert [outcome.fault for outcome in tick.outcomes] == [model.fault] * 2
    assert not tick.more


async def test_what_nobody_will_ask_for_is_not_begun(lane: Lane, model: Gated) -> None:
    one, free = generation(model), threading.Event()
    busy = asyncio.create_task(lane.run(free.wait, 30))
    await asyncio.sleep(0)
    ticks = Ticks(lane, [one], chained=True)
    ticks.abandon()
    free.set()
    await busy
    assert await asyncio.wait_for(ticks.next(), 30) is None
    assert one.evaluated == 0


async def test_handing_back_ends_with_a_checkpoint_of_the_step_under_way_and_does_no_other(
    lane: Lane, model: Gated
) -> None:
    engine, events = Engine(lane, Metrics("diffusion"), max_rows=8, max_queue=8), []
    asked = generation(model).inputs

    async def follow() -> None:
        async for event in engine.sample(model, asked, None, Terms(every=100)):
            events.append(event)

    following = asyncio.create_task(follow())
    model.go.release(2)
    for _ in range(3):
        await model.wait_begun()
    await engine.hand_back()
    model.go.release(100)
    with pytest.raises(Unavailable, match="is going away"):
        await asyncio.wait_for(following, 30)
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3]
    assert isinstance(events[-1], Frozen)
    assert events[-1].checkpoint.evaluation == 3
    await lane.run(lambda: None)
    assert not model.begun.acquire(blocking=False)
    await engine.close()
