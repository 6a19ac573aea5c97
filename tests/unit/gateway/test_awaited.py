"""Jobs of callers who wait: none goes on that nobody awaits, whenever and however the caller left."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.jobs.awaited import await_job, create_awaited
from imagemesh_runtime.errors import Unavailable


class FakeJobs:
    """Stores a job once it is let, never finishes one, and notes what is cancelled."""

    def __init__(self) -> None:
        self.asked, self.stores = asyncio.Event(), asyncio.Event()
        self.cancelled: list[str] = []

    async def create(self, request: pb.CreateJobRequest) -> tuple[pb.Job, bool]:
        self.asked.set()
        await self.stores.wait()
        return pb.Job(id="j"), False

    async def watch(self, job: str) -> AsyncGenerator[pb.Job, None]:
        yield pb.Job(id=job)
        raise Unavailable("gateway", "stops")

    async def cancel(self, job: str) -> pb.Job:
        self.cancelled.append(job)
        return pb.Job(id=job)


async def test_a_job_is_cancelled_when_the_gateway_stops_since_its_caller_asks_again() -> None:
    jobs: Any = FakeJobs()
    with pytest.raises(Unavailable):
        await await_job(jobs, "j")
    assert jobs.cancelled == ["j"]


async def test_a_job_is_cancelled_whose_caller_left_while_it_was_stored() -> None:
    jobs: Any = FakeJobs()
    creating = asyncio.create_task(create_awaited(jobs, pb.CreateJobRequest()))
    await jobs.asked.wait()
    creating.cancel()
    jobs.stores.set()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert jobs.cancelled == ["j"]


async def test_a_caller_who_stays_gets_the_job() -> None:
    jobs: Any = FakeJobs()
    jobs.stores.set()
    assert (await create_awaited(jobs, pb.CreateJobRequest())).id == "j"
    assert jobs.cancelled == []
