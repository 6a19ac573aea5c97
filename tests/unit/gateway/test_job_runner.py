"""Which failures a job is tried again after."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.jobs import runner as module
from imagemesh_gateway.jobs.board import Board
from imagemesh_gateway.jobs.record import Record, State
from imagemesh_gateway.jobs.runner import Runner
from imagemesh_gateway.jobs.store_thread import StoreThread
from imagemesh_runtime.errors import Deadly, InvalidArgument, MeshError, Overloaded, Unavailable
from tests.unit.gateway.test_job_store import JOB


async def run(folder: Path, *errors: MeshError) -> tuple[Record, int]:
    """The job once it is over, and its attempts; each ends with the next of the errors, then one is well."""
    left, attempts = list(errors), []

    async def generate(job: str, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        attempts.append(job)
        if left:
            raise left.pop(0)
        yield pb.GenerateResponse(result=pb.GenerateResult(id=job))

    store, board = StoreThread(), Board()
    await store.open(folder)
    await store(lambda one: one.add(JOB))
    runner = Runner(store, board, generate, at_a_time=4, starting=lambda: 4)
    with board.listen(JOB.id) as changed:
        runner.start()
        async with asyncio.timeout(30):
            while (record := await store(lambda one: one.get(JOB.id))) is None or not record.state.final:
                changed.clear()
                await changed.wait()
    await runner.stop(0)
    await store.close()
    return record, len(attempts)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.001)


AWAY, FULL = Unavailable("diffusion", "cannot be reached"), Overloaded("diffusion", 1, 0.001)


async def test_a_service_that_was_away_or_full_is_tried_again(tmp_path: Path) -> None:
    record, attempts = await run(tmp_path, AWAY, FULL, FULL, FULL, FULL, FULL, AWAY)
    assert (record.state, record.failures, attempts) == (State.SUCCEEDED, 2, 8)


async def test_a_job_that_its_replicas_broke_down_of_is_not_tried_again(tmp_path: Path) -> None:
    record, attempts = await run(tmp_path, AWAY, Deadly("diffusion", 3))
    assert (record.state, attempts) == (State.FAILED, 2)
    assert record.error_code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "3 replicas broke down at this request" in record.error_message


@pytest.mark.parametrize("errors", [[AWAY] * module.MAX_FAILURES, [InvalidArgument("steps", 0, "more")]])
async def test_what_does_not_pass_is_the_jobs_failure(tmp_path: Path, errors: list[MeshError]) -> None:
    record, attempts = await run(tmp_path, *errors)
    assert (record.state, attempts) == (State.FAILED, len(errors))
