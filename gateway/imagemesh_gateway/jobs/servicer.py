"""The gRPC face of jobs."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh.v1 import job_service_pb2_grpc as rpc
from imagemesh_gateway.jobs.service import Jobs


class JobServicer(rpc.JobServiceServicer):
    """Each method is one of ``Jobs``."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:
        job, existed = await self._jobs.create(request)
        return pb.CreateJobResponse(job=job, existed=existed)

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=await self._jobs.get(request.id))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        jobs, token = await self._jobs.page(request)
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        async with aclosing(self._jobs.watch(request.id)) as changes:
            async for job in changes:
                yield pb.WatchJobResponse(job=job)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        return pb.CancelJobResponse(job=await self._jobs.cancel(request.id))
