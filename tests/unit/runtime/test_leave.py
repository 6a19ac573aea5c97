"""A process whose device is at work when it is to end says what is known, and loses no error."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

import pytest

from imagemesh_runtime import service
from imagemesh_runtime.lanes import Lane


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes of a process that would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(service.os, "_exit", codes.append)
    monkeypatch.setattr(service.logging, "shutdown", lambda: None)
    monkeypatch.setattr(service, "_LAST_SECONDS", 0.01)
    return codes


@pytest.fixture
async def slow() -> AsyncIterator[Lane]:
    """A lane that loads a model."""
    lane, begun, go = Lane("test"), threading.Event(), threading.Event()

    def load_model() -> None:
        begun.set()
        go.wait(10)

    task = asyncio.create_task(lane.run(load_model))
    await asyncio.to_thread(begun.wait, 10)
    yield lane
    go.set()
    await task


async def test_slow_work_is_not_called_a_hanging_device(slow, ended, caplog) -> None:
    service.leave(slow)
    assert ended == [service.EXIT_HANGS]
    (record,) = caplog.records
    assert record.getMessage().startswith("lane test is still at ")
    assert "in load_model" in record.getMessage()
    assert "after 0 s, slow or hanging" in record.getMessage()


async def test_the_error_that_ends_the_process_is_logged_before(slow, ended, caplog) -> None:
    with caplog.at_level(logging.ERROR):
        try:
            raise OSError("the address is taken")
        except OSError:
            service.leave(slow)
    assert ended == [service.EXIT_HANGS]
    assert "OSError: the address is taken" in caplog.text.split("still at")[0]
