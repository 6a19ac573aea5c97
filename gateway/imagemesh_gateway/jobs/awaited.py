"""A job for a caller who waits for it, and without whom it need not go on."""

import asyncio
from contextlib import aclosing, suppress

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_runtime.errors import MeshError, Unavailable


async def await_job(jobs: Jobs, job: str) -> pb.Job:
    """The job once it is finished, with its pictures if it has any; it is cancelled if nobody is to await it longer.

    Raises:
        Unavailable: the gateway stops before the job runs.
    """
    try:
        async with aclosing(jobs.watch(job)) as changes:
            async for now in changes:
                if now.HasField("finished"):
                    return now
        raise Unavailable("gateway", f"stopped telling of job {job}")
    except (asyncio.CancelledError, Unavailable):  # then the caller asks again, and one of the two jobs is enough
        await asyncio.shield(jobs.cancel(job))
        raise


async def create_awaited(jobs: Jobs, request: pb.CreateJobRequest) -> pb.Job:
    """A new job for a caller who will await it; it is cancelled if the caller is, whether it is stored by then or not.

    Raises:
        MeshError: as ``Jobs.create``.
    """
    creating = asyncio.ensure_future(jobs.create(request))
    try:
        job, _ = await asyncio.shield(creating)
    except asyncio.CancelledError:
        await asyncio.shield(_undo(jobs, creating))
        raise
    return job


async def _undo(jobs: Jobs, creating: asyncio.Future[tuple[pb.Job, bool]]) -> None:
    with suppress(MeshError, asyncio.CancelledError):  # there is no job, or it is finished and gone
        job, _ = await creating
        await jobs.cancel(job.id)
