"""Who waits, for how long, who goes first, and who is told at the door that it would be for nothing.

The model computes nothing and takes a declared time: a * rows + t seconds a forward.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from imagemesh_runtime.context import CallContext, set_current_call
from imagemesh_runtime.errors import DeadlineExceeded, Overloaded, TooMuchAhead
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import Residuals, Run, SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import PATIENCE, Finished, Progress, Terms

A, T = 0.004, 0.012


class Device(FakeDiffusionModel):
    """Takes its declared time for a forward."""

    def advance(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Sequence[Exception | None]:
        time.sleep(A * sum(len(run.latents()) for run in runs) + T)
        return super().advance(runs, residuals)


class Bench:
    """An engine before such a device."""

    def __init__(self, max_rows: int = 4, max_queue: int = 64) -> None:
        self.lane, self.metrics, self.model = Lane("test"), Metrics("diffusion"), Device()
        self.engine = Engine(self.lane, self.metrics, max_rows=max_rows, max_queue=max_queue)

    @property
    def backlog(self) -> float:
        value = self.metrics.registry.get_sample_value("imagemesh_backlog_seconds", {"queue": "diffusion"})
        assert value is not None
        return value

    async def run(self, steps: int = 5, pictures: int = 1, terms: Terms | None = None, deadline: float = 0) -> float:
        """One generation; answers when it was done."""
        call = CallContext()
        if deadline:
            call.deadline = time.monotonic() + deadline
        set_current_call(call)
        embeds = np.ones((1, 8, 4), dtype=np.float32)
        inputs = SampleInputs({"prompt_embeds": embeds}, 64, 64, steps, 1.0, None, tuple(range(pictures)))
        async for event in self.engine.sample(self.model, inputs, None, terms):
            last = event
        assert isinstance(last, Finished)
        return time.monotonic()

    async def warm_up(self) -> None:
        """Measure the device at several batch sizes."""
        await asyncio.gather(*(self.run(steps=8 + 4 * i) for i in range(4)))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.engine.close()
    bench.lane.close()


async def started(work: "asyncio.Task[float]") -> None:
    """Let the engine take note of the task."""
    for _ in range(3):
        await asyncio.sleep(0)
    assert not work.done()


async def test_the_backlog_is_the_time_that_the_work_really_takes(bench: Bench) -> None:
    await bench.warm_up()
    assert bench.backlog == 0
    begun = time.monotonic()
    tasks = [asyncio.create_task(bench.run(steps=10 + 3 * i, pictures=1 + i % 3)) for i in range(9)]
    await started(tasks[-1])
    predicted = bench.backlog
    taken = max(await asyncio.gather(*tasks)) - begun
    assert 0.6 < predicted / taken < 1.5, (predicted, taken)
    assert bench.backlog == 0


async def test_before_anything_was_measured_nothing_is_refused_and_no_backlog_is_made_up(bench: Bench) -> None:
    task = asyncio.create_task(bench.run(steps=3, deadline=30))
    await started(task)
    assert bench.backlog == 0
    await task


async def test_what_would_miss_its_deadline_behind_others_is_refused_before_any_work(bench: Bench) -> None:
    await bench.warm_up()
    ahead = [asyncio.create_task(bench.run(steps=100, pictures=4)) for _ in range(3)]
    await started(ahead[-1])
    with pytest.raises(TooMuchAhead, match="s of work are ahead") as caught:
        await bench.run(steps=5, deadline=1.0)
    assert 0.1 <= (caught.value.retry_after() or 0) <= 3 * bench.backlog
    for task in ahead:
        task.cancel()


async def test_what_is_too_long_by_itself_is_told_so_and_not_to_come_back(bench: Bench) -> None:
    await bench.warm_up()
    with pytest.raises(DeadlineExceeded, match="takes about") as caught:
        await bench.run(steps=500, deadline=1.0)
    assert caught.value.retry_after() is None


async def test_what_can_make_its_deadline_is_let_in(bench: Bench) -> None:
    await bench.warm_up()
    assert await bench.run(steps=5, deadline=20)


async def test_a_full_queue_says_when_there_will_be_room(bench: Bench) -> None:
    await bench.warm_up()
    small = Bench(max_rows=1, max_queue=1)
    small.engine._pace._kinds = bench.engine._pace._kinds
    tasks = []
    for _ in range(2):  # the first runs, the second waits
        tasks.append(asyncio.create_task(small.run(steps=50)))
        await asyncio.sleep(2 * (A + T))
    with pytest.raises(Overloaded) as caught:
        await small.run()
    assert 0.3 < (caught.value.retry_after() or 0) < 5
    for task in tasks:
        task.cancel()
    await small.engine.close()
    small.lane.close()


async def order_of(bench: Bench, patiences: Sequence[float]) -> list[int]:
    """In which order generations of these patiences, come one after another behind a busy engine, are done."""
    busy = asyncio.create_task(bench.run(steps=10, pictures=4))
    await started(busy)
    tasks = []
    for patience in patiences:
        tasks.append(asyncio.create_task(bench.run(steps=3, pictures=4, terms=Terms(patience))))
        await started(tasks[-1])
    times = await asyncio.gather(*tasks)
    await busy
    return sorted(range(len(times)), key=lambda i: times[i])


async def test_interactive_goes_before_normal_before_batch(bench: Bench) -> None:
    patiences = [PATIENCE[name] for name in ("batch", "normal", "interactive", "normal")]
    assert await order_of(bench, patiences) == [2, 1, 3, 0]


async def test_patience_ends_so_that_nobody_starves(bench: Bench) -> None:
    busy = asyncio.create_task(bench.run(steps=10, pictures=4))
    await started(busy)
    patient = asyncio.create_task(bench.run(steps=3, pictures=4, terms=Terms(0.02)))
    await asyncio.sleep(0.05)
    hasty = asyncio.create_task(bench.run(steps=3, pictures=4, terms=Terms(0.0)))
    assert await patient < await hasty
    await busy


async def test_a_lone_one_runs_with_nobody_beside_it() -> None:
    bench = Bench(max_rows=16)
    seen: list[int] = []
    advance = bench.model.advance
    bench.model.advance = lambda runs, residuals: (seen.append(len(runs)), advance(runs, residuals))[1]  # type: ignore[method-assign]
    others = [asyncio.create_task(bench.run(steps=6)) for _ in range(2)]
    await started(others[0])
    lone = asyncio.create_task(bench.run(steps=6, terms=Terms(alone=True)))
    await started(lone)
    late = asyncio.create_task(bench.run(steps=6))
    await asyncio.gather(*others, lone, late)
    assert seen == [2] * 6 + [1] * 12
    await bench.engine.close()
    bench.lane.close()


async def test_progress_still_comes_while_others_wait(bench: Bench) -> None:
    steps = []
    embeds = np.ones((1, 8, 4), dtype=np.float32)
    inputs = SampleInputs({"prompt_embeds": embeds}, 64, 64, 4, 1.0, None, (1,))
    async for event in bench.engine.sample(bench.model, inputs):
        if isinstance(event, Progress):
            steps.append(event.step)
    assert steps == [1, 2, 3, 4]
