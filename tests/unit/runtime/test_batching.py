"""The batcher: who shares a batch with whom, and that nobody's misfortune is another's."""

import asyncio
import time
from collections.abc import AsyncIterator, Hashable, Sequence

import numpy as np
import pytest

from imagemesh_runtime.batching import Batcher, submit_rows
from imagemesh_runtime.context import CallContext, current_call, set_current_call
from imagemesh_runtime.errors import Overloaded, Unavailable
from imagemesh_runtime.metrics import Metrics


class Machine:
    """Doubles integers; each batch waits for a permit. The item 13 fails; so does any batch it is in."""

    def __init__(self) -> None:
        self.batches: list[tuple[Hashable, list[int]]] = []
        self.begun = asyncio.Semaphore(0)
        self.permits = asyncio.Semaphore(0)

    async def compute(self, key: Hashable, items: Sequence[int]) -> list[int]:
        self.batches.append((key, list(items)))
        self.begun.release()
        await self.permits.acquire()
        current_call().compute_seconds += 0.25
        current_call().queue_seconds += 0.5
        if 13 in items:
            raise ArithmeticError("13")
        return [2 * item for item in items]

    def let_all(self) -> None:
        for _ in range(100):
            self.permits.release()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("test")


@pytest.fixture
async def machine() -> Machine:
    return Machine()


@pytest.fixture
async def batcher(machine: Machine, metrics: Metrics) -> AsyncIterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher(machine.compute, metrics, max_rows=4, max_queue=5)
    yield batcher
    await batcher.close()


async def submit(batcher: Batcher[int, int], item: int, rows: int = 1, key: Hashable = "k") -> asyncio.Task[int]:
    """The task of a submitted item, which is in the queue when this returns."""
    task = asyncio.create_task(batcher.submit(key, item, rows))
    await asyncio.sleep(0)
    return task


async def occupied(batcher: Batcher[int, int], machine: Machine) -> asyncio.Task[int]:
    """The machine is at work on item 0, so that what comes next waits."""
    task = await submit(batcher, 0)
    await machine.begun.acquire()
    return task


def sample(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"service": "test"})


async def test_a_lone_request_starts_at_once(batcher, machine) -> None:
    machine.let_all()
    assert await batcher.submit("k", 21) == 42
    assert machine.batches == [("k", [21])]


async def test_requests_that_arrive_during_a_batch_merge_in_order(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in (1, 2, 3)]]
    machine.let_all()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
    assert machine.batches == [("k", [0]), ("k", [1, 2, 3])]


async def test_keys_keep_apart(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine)]
    tasks += [await submit(batcher, i, key=key) for i, key in ((1, "a"), (2, "b"), (3, "a"))]
    machine.let_all()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
    assert machine.batches[1:] == [("a", [1, 3]), ("b", [2])]


async def test_a_batch_has_at_most_max_rows(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i, rows=2) for i in (1, 2, 3)]]
    machine.let_all()
    await asyncio.gather(*tasks)
    assert machine.batches[1:] == [("k", [1, 2]), ("k", [3])]


async def test_an_item_bigger_than_max_rows_runs_alone(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine)]
    tasks += [await submit(batcher, i, rows=rows) for i, rows in ((1, 9), (2, 1), (3, 1))]
    machine.let_all()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
    assert machine.batches[1:] == [("k", [1]), ("k", [2, 3])]


async def test_the_oldest_request_is_always_in_the_next_batch(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine)]
    tasks += [await submit(batcher, i, rows=rows) for i, rows in ((1, 3), (2, 2), (3, 1), (4, 3))]
    machine.let_all()
    await asyncio.gather(*tasks)
    assert machine.batches[1:] == [("k", [1, 3]), ("k", [2]), ("k", [4])]


async def test_a_caller_that_leaves_the_queue_poisons_nobody(batcher, machine, metrics) -> None:
    first, leaver, other = await occupied(batcher, machine), await submit(batcher, 1), await submit(batcher, 2)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    assert sample(metrics, "imagemesh_pending_requests") == 1
    machine.let_all()
    assert await asyncio.gather(first, other) == [0, 4]
    assert machine.batches[1:] == [("k", [2])]
    assert sample(metrics, "imagemesh_cancelled_requests_total") == 1


async def test_a_caller_that_leaves_frees_its_place_in_a_full_queue(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in range(1, 6)]]
    tasks.pop(3).cancel()
    await asyncio.sleep(0)
    tasks.append(await submit(batcher, 6))
    machine.let_all()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 8, 10, 12]


async def test_a_caller_that_leaves_a_running_batch_poisons_nobody(batcher, machine) -> None:
    first, leaver, other = await occupied(batcher, machine), await submit(batcher, 1), await submit(batcher, 2)
    machine.permits.release()
    await machine.begun.acquire()  # both are in work
    leaver.cancel()
    machine.let_all()
    assert await asyncio.gather(first, other) == [0, 4]
    assert await batcher.submit("k", 5) == 10


async def test_a_failing_item_fails_alone(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in (1, 13, 3)]]
    machine.let_all()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[:2] + results[3:] == [0, 2, 6]
    assert isinstance(results[2], ArithmeticError)


async def test_items_whose_callers_left_are_not_run_again_after_a_failure(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in (1, 13, 3)]]
    machine.permits.release()
    await machine.begun.acquire()
    tasks[1].cancel()
    machine.let_all()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert machine.batches[2:] == [("k", [13]), ("k", [3])]


async def test_a_failure_does_not_stop_the_work(batcher, machine) -> None:
    machine.let_all()
    with pytest.raises(ArithmeticError):
        await batcher.submit("k", 13)
    assert await batcher.submit("k", 1) == 2


@pytest.mark.parametrize("count", [0, 2])
async def test_a_wrong_number_of_results_is_an_error(metrics, count: int) -> None:
    async def compute(key: Hashable, items: Sequence[int]) -> list[int]:
        return [0] * count

    batcher: Batcher[int, int] = Batcher(compute, metrics, max_rows=4, max_queue=4)
    with pytest.raises(RuntimeError, match=f"1 items gave {count} results"):
        await batcher.submit("k", 1)


async def test_a_full_queue_refuses_and_says_when_to_come_back(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in range(1, 6)]]
    with pytest.raises(Overloaded, match="queue test is full") as caught:
        await batcher.submit("k", 9)
    assert caught.value.retry_after() > 0
    machine.let_all()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10]


async def test_close_leaves_nobody_hanging(batcher, machine, metrics) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i, key=i) for i in (1, 2)]]
    await batcher.close()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert [type(result) for result in results] == [Unavailable] * 3
    assert sample(metrics, "imagemesh_cancelled_requests_total") == 0
    assert sample(metrics, "imagemesh_running_requests") == 0


async def test_close_during_a_rerun_leaves_nobody_hanging(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in (1, 13, 3)]]
    machine.permits.release()
    machine.permits.release()
    for _ in range(2):
        await machine.begun.acquire()  # the batch, then its first item alone
    await batcher.close()
    results = await asyncio.wait_for(asyncio.gather(*tasks[1:], return_exceptions=True), 5)
    assert [type(result) for result in results] == [Unavailable] * 3


async def test_a_closed_batcher_takes_nothing(batcher) -> None:
    await batcher.close()
    with pytest.raises(Unavailable):
        await batcher.submit("k", 1)


async def test_work_that_is_cancelled_from_within_fails_its_callers_and_goes_on(metrics) -> None:
    async def compute(key: Hashable, items: Sequence[int]) -> list[int]:
        if 1 in items:
            raise asyncio.CancelledError  # as awaiting a lane that closes does
        return list(items)

    batcher: Batcher[int, int] = Batcher(compute, metrics, max_rows=1, max_queue=4)
    results = await asyncio.gather(*(batcher.submit("k", i) for i in (1, 2)), return_exceptions=True)
    assert isinstance(results[0], Unavailable)
    assert results[1] == 2


async def test_everyone_in_a_batch_is_charged_for_it(batcher, machine) -> None:
    calls = [CallContext() for _ in range(3)]

    async def one(call: CallContext, item: int) -> int:
        set_current_call(call)
        return await batcher.submit("k", item)

    tasks = [await occupied(batcher, machine)]
    tasks += [asyncio.create_task(one(call, i)) for i, call in enumerate(calls)]
    await asyncio.sleep(0)
    machine.let_all()
    await asyncio.gather(*tasks)
    assert [call.compute_seconds for call in calls] == [0.25] * 3
    assert all(call.queue_seconds > 0.5 for call in calls)  # the lane's wait and the queue's


async def test_a_failed_attempt_is_charged_too(batcher, machine) -> None:
    call = CallContext()
    set_current_call(call)
    machine.let_all()
    with pytest.raises(ArithmeticError):
        await batcher.submit("k", 13)
    assert call.compute_seconds == 0.25


async def test_the_metrics_count_rows_and_waits(batcher, machine, metrics) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i, rows=2) for i in (1, 2)]]
    assert sample(metrics, "imagemesh_pending_requests") == 2
    assert sample(metrics, "imagemesh_running_requests") == 1
    machine.let_all()
    await asyncio.gather(*tasks)
    assert sample(metrics, "imagemesh_batch_size_count") == 2
    assert sample(metrics, "imagemesh_batch_size_sum") == 5
    assert sample(metrics, "imagemesh_queue_wait_seconds_count") == 3
    assert sample(metrics, "imagemesh_pending_requests") == 0


async def submit_all(batcher: Batcher[int, int], *items: int, key: Hashable = "k") -> asyncio.Task[list[int]]:
    """The task of a request of several items of two rows each, which is in the queue when this returns."""
    task = asyncio.create_task(batcher.submit_all(key, items, [2] * len(items)))
    await asyncio.sleep(0)
    return task


async def test_a_request_in_parts_gets_a_result_a_part_in_order(batcher, machine) -> None:
    first, request, other = (
        await occupied(batcher, machine),
        await submit_all(batcher, 3, 1, 2),
        await submit(batcher, 4),
    )
    machine.let_all()
    assert await asyncio.gather(first, request, other) == [0, [6, 2, 4], 8]
    assert machine.batches[1:] == [("k", [3, 1]), ("k", [2, 4])]


async def test_a_request_of_no_items_does_nothing(batcher, machine) -> None:
    assert await batcher.submit_all("k", [], []) == []
    assert machine.batches == []


async def test_a_request_takes_one_place_however_many_parts_it_has(batcher, machine, metrics) -> None:
    tasks = [await occupied(batcher, machine), await submit_all(batcher, *range(20, 29))]
    tasks += [await submit(batcher, i) for i in (1, 2, 3, 4)]
    assert sample(metrics, "imagemesh_pending_requests") == 5
    with pytest.raises(Overloaded):
        await batcher.submit("k", 9)
    machine.let_all()
    results = await asyncio.gather(*tasks)
    assert results[1] == list(range(40, 58, 2))
    assert sample(metrics, "imagemesh_queue_wait_seconds_count") == 6


async def test_a_refused_request_does_no_part_of_its_work(batcher, machine) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in range(1, 6)]]
    with pytest.raises(Overloaded):
        await batcher.submit_all("k", [7, 8, 9], [2, 2, 2])
    machine.let_all()
    await asyncio.gather(*tasks)
    assert {item for _, items in machine.batches for item in items} == set(range(6))


async def test_a_caller_that_leaves_takes_all_its_parts_along_and_counts_once(batcher, machine, metrics) -> None:
    first, leaver, other = (
        await occupied(batcher, machine),
        await submit_all(batcher, 1, 2, 3),
        await submit(batcher, 4),
    )
    machine.permits.release()
    await machine.begun.acquire()  # its first two parts are in work
    leaver.cancel()
    machine.let_all()
    assert await asyncio.gather(first, other) == [0, 8]
    assert machine.batches[1:] == [("k", [1, 2]), ("k", [4])]
    assert sample(metrics, "imagemesh_cancelled_requests_total") == 1


async def test_when_a_part_fails_those_not_begun_never_run(batcher, machine) -> None:
    first, request, other = (
        await occupied(batcher, machine),
        await submit_all(batcher, 13, 1, 2, 3),
        await submit(batcher, 4),
    )
    machine.let_all()
    with pytest.raises(ArithmeticError):
        await request
    assert await asyncio.gather(first, other) == [0, 8]
    assert machine.batches[1:] == [("k", [13, 1]), ("k", [13]), ("k", [4])]


async def test_a_request_in_parts_is_charged_once_a_batch(batcher, machine) -> None:
    call = CallContext()
    set_current_call(call)
    machine.let_all()
    await batcher.submit_all("k", [1, 2, 3], [2, 2, 2])
    assert [items for _, items in machine.batches] == [[1, 2], [3]]
    assert call.compute_seconds == 0.5
    assert 1.0 <= call.queue_seconds < 1.5  # what the machine says of each batch, and next to nothing of the queue


async def test_rows_are_cut_into_batches_of_at_most_max_rows(metrics) -> None:
    sizes: list[int] = []

    async def compute(key: Hashable, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        sizes.append(sum(len(item) for item in items))
        return [2 * item for item in items]

    batcher: Batcher[np.ndarray, np.ndarray] = Batcher(compute, metrics, max_rows=4, max_queue=1)
    parts = await submit_rows(batcher, "k", np.arange(10))
    assert np.concatenate(parts).tolist() == list(range(0, 20, 2))
    assert sizes == [4, 4, 2]


async def test_a_request_in_preparation_holds_its_place(batcher, machine, metrics) -> None:
    tasks = [await occupied(batcher, machine), *[await submit(batcher, i) for i in range(1, 5)]]
    with batcher.reserve():
        assert sample(metrics, "imagemesh_pending_requests") == 5
        with pytest.raises(Overloaded):
            await batcher.submit("k", 9)
        with pytest.raises(Overloaded), batcher.reserve():
            pytest.fail("the queue was full")
    tasks.append(await submit(batcher, 5))
    machine.let_all()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10]


async def test_nothing_is_prepared_for_a_closed_batcher(batcher) -> None:
    await batcher.close()
    with pytest.raises(Unavailable), batcher.reserve():
        pytest.fail("the batcher was closed")


@pytest.mark.parametrize(("seconds_left", "counted"), [(None, 1), (3600.0, 1), (-0.1, 0)])
@pytest.mark.parametrize("preparing", [True, False])
async def test_only_callers_who_went_are_counted_not_deadlines(
    batcher, machine, metrics, seconds_left: float | None, counted: int, preparing: bool
) -> None:
    async def one() -> None:
        set_current_call(CallContext(deadline=None if seconds_left is None else time.monotonic() + seconds_left))
        if preparing:
            with batcher.reserve():
                await asyncio.Event().wait()
        await batcher.submit("k", 1)

    task = asyncio.create_task(one())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sample(metrics, "imagemesh_cancelled_requests_total") == counted
    assert sample(metrics, "imagemesh_pending_requests") == 0
