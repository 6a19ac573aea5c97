"""The generations of these clients, and how they stand: that API asks of all of them at once."""

import asyncio
import time
from collections import defaultdict
from typing import Any

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.http_jobs import result_of
from imagemesh_gateway.jobs.awaited import await_job, create_awaited
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_gateway.sdapi.answers import generation_json
from imagemesh_gateway.sdapi.bodies import GenerationBody
from imagemesh_gateway.sdapi.pictures import in_base64
from imagemesh_gateway.sdapi.translate import Asked
from imagemesh_runtime.errors import MeshError

# The client has its pictures then.
_KEPT_SECONDS = 3600.0


class Work:
    """Runs generations as jobs and remembers which are each tenant's by these clients, in the order in which they
    came."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._by_tenant: defaultdict[str, dict[str, float]] = defaultdict(dict)

    @property
    def _running(self) -> dict[str, float]:
        """The caller's tenant's jobs, and when they came."""
        return self._by_tenant[current_caller().tenant]

    async def generate(self, asked: Asked, body: GenerationBody) -> dict[str, Any]:
        """Make the pictures; of an interrupted generation there are none. Errors are those of the job."""
        create = pb.CreateJobRequest(generate=asked.request, retention_seconds=_KEPT_SECONDS)
        job = await create_awaited(self._jobs, create)
        self._running[job.id] = time.monotonic()
        try:
            done = await await_job(self._jobs, job.id)
        finally:
            del self._running[job.id]
        result = None if done.state == pb.JOB_STATE_CANCELLED else result_of(done)
        return await asyncio.to_thread(generation_json, done, result, body, asked.ignored)

    async def interrupt(self) -> None:
        """Cancel what runs."""
        for job in list(self._running):
            await self._jobs.cancel(job)

    async def progress(self, with_picture: bool) -> dict[str, Any]:
        """How the oldest of them stands."""
        jobs = list(self._running.items())
        told, elapsed = pb.Job(), 0.0
        if jobs:
            told, elapsed = await self._told(jobs[0][0]), time.monotonic() - jobs[0][1]
        step, steps = told.progress.step, told.progress.steps
        part = step / steps if steps else 0.0
        previews = told.progress.previews if with_picture else ()
        return {
            "progress": part,
            "eta_relative": elapsed / part - elapsed if part else 0.0,
            "state": {
                "skipped": False,
                "interrupted": False,
                "stopping_generation": False,
                "job": told.id,
                "job_count": len(jobs),
                "job_timestamp": told.created.ToJsonString() if told.id else "0",
                "job_no": 0,
                "sampling_step": step,
                "sampling_steps": steps,
            },
            "current_image": in_base64(previews[0]) if previews else None,
            "textinfo": None,
        }

    async def _told(self, job: str) -> pb.Job:
        try:
            return await self._jobs.get(job, pictures=False)
        except MeshError:  # gone meanwhile
            return pb.Job()
