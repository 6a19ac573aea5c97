"""Jobs, for callers with an event loop of their own."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar, Unpack

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh.v1 import job_service_pb2_grpc as rpc
from imagemesh_client import job_answers
from imagemesh_client.fields import UINT32, whole
from imagemesh_client.job_types import Job, JobOptions, StateName
from imagemesh_client.requests import generate_request
from imagemesh_client.types import Generation, Progress
from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import MeshError

T = TypeVar("T")

_PAGE = 100
# Pauses before a call is made again that found no gateway.
_PAUSES = (0.2, 0.5, 1.0, 2.0)
_TERMS = ("idempotency_key", "finish_within", "keep_for")


class AsyncJobs:
    """Generations that the gateway keeps: they outlive this client's connection, and a restart of the gateway.

    A call that finds no gateway is made again for some seconds; none of them does a thing twice.
    """

    def __init__(self, connect: Callable[[], Peer], timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout

    async def create(self, prompt: str, **options: Unpack[JobOptions]) -> Job:
        """Have a generation accepted. Once this returns, it will be run."""
        asked: dict[str, Any] = dict(options)
        terms = {name: asked.pop(name, None) for name in _TERMS}
        request = pb.CreateJobRequest(
            generate=await asyncio.to_thread(generate_request, prompt, **asked),
            idempotency_key=terms["idempotency_key"] or secrets.token_hex(16),
            timeout_seconds=terms["finish_within"],
            retention_seconds=terms["keep_for"],
        )
        answer = await self._again(lambda peer: peer.unary(rpc.JobServiceStub(peer.channel).CreateJob, request))
        return job_answers.job(answer.job)

    async def get(self, job: str) -> Job:
        """How a job stands, with the pictures if it has succeeded."""
        request = pb.GetJobRequest(id=job)
        answer = await self._again(lambda peer: peer.unary(rpc.JobServiceStub(peer.channel).GetJob, request))
        return job_answers.job(answer.job)

    async def list(self, states: Iterable[StateName] = (), limit: int = 50) -> list[Job]:
        """At most ``limit`` jobs in these states (none given: in any), the newest first."""
        most = whole("limit", limit, UINT32, least=1)
        found: list[Job] = []
        token, wanted = "", job_answers.state_numbers(list(states))
        while len(found) < most:
            size = min(most - len(found), _PAGE)
            request = pb.ListJobsRequest(states=wanted, page_size=size, page_token=token)
            answer = await self._page(request)
            found += map(job_answers.job, answer.jobs)
            token = answer.next_page_token
            if not token:
                break
        return found

    async def watch(self, job: str) -> AsyncGenerator[Job, None]:
        """How a job stands, now and whenever that changes, until it is finished; the last one has the pictures.

        A connection that drops is made again, for at most the client's ``timeout`` without news.
        """
        request, told, tries = pb.WatchJobRequest(id=job), None, 0
        heard = time.monotonic()
        while True:
            peer = self._connect()
            try:
                stream = peer.stream(rpc.JobServiceStub(peer.channel).WatchJob, request)
                async with aclosing(stream) as responses:
                    async for response in responses:
                        heard, tries = time.monotonic(), 0
                        now = job_answers.job(response.job)
                        if now != told:
                            told = now
                            yield now
                        if now.done:
                            return
            except MeshError as error:
                if not job_answers.may_go_on(error) or time.monotonic() - heard > self._timeout:
                    raise
            await asyncio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
            tries += 1

    async def wait(self, job: str, *, on_progress: Callable[[Progress], None] | None = None) -> Generation:
        """The pictures of a job, once it has them.

        Raises:
            MeshError: it failed, with the code that it failed for; or was cancelled (CANCELLED).
        """
        ended: Job | None = None
        async with aclosing(self.watch(job)) as changes:
            async for ended in changes:
                if on_progress is not None and ended.progress is not None:
                    on_progress(ended.progress)
        assert ended is not None
        return job_answers.outcome(ended)

    async def cancel(self, job: str) -> Job:
        """Cancel a job unless it is finished; the answer tells which of the two it is."""
        request = pb.CancelJobRequest(id=job)
        answer = await self._again(lambda peer: peer.unary(rpc.JobServiceStub(peer.channel).CancelJob, request))
        return job_answers.job(answer.job)

    async def _page(self, request: pb.ListJobsRequest) -> pb.ListJobsResponse:
        return await self._again(lambda peer: peer.unary(rpc.JobServiceStub(peer.channel).ListJobs, request))

    async def _again(self, call: Callable[[Peer], Awaitable[T]]) -> T:
        for pause in _PAUSES:
            try:
                return await call(self._connect())
            except MeshError as error:
                if not job_answers.is_passing(error):
                    raise
            await asyncio.sleep(pause)
        return await call(self._connect())
