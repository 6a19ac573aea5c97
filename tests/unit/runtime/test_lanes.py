"""A lane runs one thing at a time, and a caller that leaves does not stay in its way."""

import asyncio
import threading
from pathlib import Path

import pytest

from imagemesh_runtime.context import CallContext, set_current_call
from imagemesh_runtime.lanes import Lane


@pytest.fixture
def lane():
    lane = Lane("test")
    yield lane
    lane.close()


async def wait_for(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


async def test_everything_runs_on_one_thread_that_is_not_the_callers(lane) -> None:
    threads = {await lane.run(threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_arguments_results_and_exceptions_pass_through(lane) -> None:
    assert await lane.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await lane.run(divmod, 7, 0)


async def test_what_had_not_begun_when_its_caller_left_never_does(lane) -> None:
    begun, go, ran = threading.Event(), threading.Event(), []

    def block() -> None:
        begun.set()
        go.wait(10)

    blocker = asyncio.create_task(lane.run(block))
    await wait_for(begun)
    waiting = asyncio.create_task(lane.run(ran.append, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    await blocker
    await lane.run(ran.append, 2)
    assert ran == [2]


async def test_a_caller_that_leaves_does_not_wait_for_what_runs(lane) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        go.wait(10)
        ended.set()

    task = asyncio.create_task(lane.run(block))
    await wait_for(begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ended.is_set()
    go.set()
    assert await lane.run(lambda: 5) == 5  # the lane is as good as before


async def test_the_call_is_charged_for_its_wait_and_its_work(lane) -> None:
    begun, go = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        go.wait(10)

    blocker = asyncio.create_task(lane.run(block))
    await wait_for(begun)
    call = CallContext()
    set_current_call(call)
    waiting = asyncio.create_task(lane.run(lambda: None))
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(blocker, waiting)
    assert call.queue_seconds > 0
    assert 0 < call.compute_seconds < call.queue_seconds + 1


async def test_close_drops_what_waits() -> None:
    lane, begun, go = Lane("closing"), threading.Event(), threading.Event()

    def block() -> int:
        begun.set()
        go.wait(10)
        return 1

    running = asyncio.create_task(lane.run(block))
    await wait_for(begun)
    waiting = asyncio.create_task(lane.run(lambda: 2))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(lane.close))
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    await closing
    assert await running == 1


async def test_the_system_knows_the_lanes_thread_by_its_name() -> None:
    lane = Lane("text-encoder")
    comm = await lane.run(lambda: Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text())
    lane.close()
    assert comm.strip() == "lane-text-encod"
