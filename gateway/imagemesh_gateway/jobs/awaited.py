"""A job for a caller who waits for it, and without whom it need not go on."""

import asyncio
from contextlib import aclosing

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_runtime.errors import Unavailable


async def await_job(jobs: Jobs, job: str) -> pb.Job:
    """The job once it is finished, with its pictures if it has any; it is cancelled if the caller is.

    Raises:
        Unavailable: the gateway stops before the job runs.
    """
    try:
        async with aclosing(jobs.watch(job)) as changes:
            async for now in changes:
                if now.HasField("finished"):
                    return now
    except asyncio.CancelledError:
        await asyncio.shield(jobs.cancel(job))
        raise
    raise Unavailable("gateway", f"stopped telling of job {job}")
