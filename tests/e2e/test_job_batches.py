"""Many jobs at once: the sampler's batch is full while there are jobs, and they wait in the store, not in its queue."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from imagemesh_client import AsyncClient
from imagemesh_services.diffusion.backend import Residuals, Run
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from tests.support.mesh import running_mesh

JOBS, STEPS, ROWS, STARTING = 30, 20, 8, 4
TICK = 0.04
BACKLOG = ("imagemesh_backlog_seconds", {"queue": "diffusion"})


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many generations shared each forward; one takes as long as it would on a device."""
    found: list[int] = []
    advance = FakeDiffusionModel.advance

    def slowly(
        model: FakeDiffusionModel, runs: Sequence[Run], residuals: Sequence[Residuals | None]
    ) -> Sequence[Exception | None]:
        found.append(len(runs))
        time.sleep(TICK)
        return advance(model, runs, residuals)

    monkeypatch.setattr(FakeDiffusionModel, "advance", slowly)
    return found


async def test_thirty_jobs_fill_the_batch_and_the_rest_of_them_wait_in_the_store(batches: list[int]) -> None:
    gateway = {"max_starting_jobs": str(STARTING)}
    with running_mesh(gateway, backend="fake", max_batch=str(ROWS)) as mesh:
        pending = mesh.services["diffusion"]._models._metrics.pending
        deepest, queued = 0, 0
        metrics = mesh.gateway.metrics.registry.get_sample_value
        each: list[float] = []  # seconds that the gateway takes a waiting job to need
        async with AsyncClient(mesh.grpc_address) as client:
            asked = (client.jobs.create("a cat", seed=i, steps=STEPS, guidance=1.0) for i in range(JOBS))
            made = await asyncio.gather(*asked)
            waits = [asyncio.create_task(client.jobs.wait(job.id)) for job in made]
            while not all(wait.done() for wait in waits):
                deepest = max(deepest, int(pending._value.get()))
                queued = max(queued, len(await client.jobs.list(["queued"], limit=JOBS)))
                model = {"service": "gateway", "model": made[0].model}
                waiting, seconds = metrics("imagemesh_waiting_jobs", model), metrics(*BACKLOG)
                if waiting and seconds:
                    each.append(seconds / waiting)
                await asyncio.sleep(TICK)
            assert all(wait.result().images for wait in waits)
        assert metrics("imagemesh_waiting_jobs", model) == metrics(*BACKLOG) == 0
    assert sum(batches) == JOBS * STEPS
    # Of a forward's time each has its share. The first to be done had it with few others.
    assert 0.5 <= min(each) / (STEPS * TICK / ROWS) <= 3
    assert max(batches) == ROWS
    assert deepest <= STARTING
    assert queued >= JOBS - 2 * (ROWS + STARTING)
    # 30 jobs are no multiple of 8, and the first come one by one.
    assert sum(batches) / len(batches) > 0.7 * ROWS
