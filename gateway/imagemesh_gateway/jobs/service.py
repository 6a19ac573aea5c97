"""Jobs as every face of the gateway offers them."""

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import Gauge

from imagemesh.v1 import gateway_service_pb2
from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.access.admission import Admission
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.jobs.board import Board
from imagemesh_gateway.jobs.messages import job_message, states
from imagemesh_gateway.jobs.record import Record, State, Waiting
from imagemesh_gateway.jobs.runner import Runner
from imagemesh_gateway.jobs.store import Store
from imagemesh_gateway.jobs.store_thread import StoreThread
from imagemesh_gateway.jobs.terms import check, new_job
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.pipeline import generate
from imagemesh_gateway.plan import make_plan
from imagemesh_runtime.errors import AlreadyExists, InvalidArgument, NotFound, Overloaded, Unavailable, shorten
from imagemesh_runtime.metrics import Metrics

DEFAULT_PAGE, MAX_PAGE = 50, 500
_RETRY_SECONDS = 5.0


class UnknownJob(NotFound):
    """No job has this id: it never had one, it has expired, or it is another tenant's."""

    def __init__(self, job: str) -> None:
        super().__init__("job", job, ())
        self.args = (f"job {shorten(job)} not found; it may have expired",)


class Jobs:
    """Accepts, runs and tells of jobs, from ``start`` to ``stop``."""

    def __init__(self, config: GatewayConfig, mesh: Mesh, metrics: Metrics) -> None:
        self._config = config
        self._mesh = mesh
        self._metrics = metrics
        self._store = StoreThread()
        self.admission = Admission(self._store)
        self._board = Board()
        self._runner = Runner(
            self._store, self._board, self._generate, config.max_running_jobs,
            starting=lambda: config.max_starting_jobs * max(len(mesh.diffusion.peers), 1),
            tell_waiting=self._tell_waiting, spans=metrics.spans,
        )  # fmt: skip
        self._waiting = Gauge(
            "imagemesh_waiting_jobs", "Jobs that wait in the gateway's store.", ("service", "model"),
            registry=metrics.registry,
        )  # fmt: skip
        # The samplers tell of the rest of it.
        self._backlog = metrics.backlog.labels(mesh.diffusion.name)
        self._told_models: set[str] = set()
        self._passing: TemporaryDirectory[str] | None = None

    async def start(self) -> None:
        """Open the store and go on with what is in there.

        Raises:
            FailedPrecondition: the folder can't be used, or another gateway has it.
        """
        folder = folder_of(self._config)
        if folder is None:
            self._passing = TemporaryDirectory(prefix="imagemesh-jobs-", ignore_cleanup_errors=True)
            folder = Path(self._passing.name)
        await self._store.open(folder)
        self._runner.start()

    async def drain(self, grace_seconds: float) -> None:
        """Begin no more jobs, let those that run end within the grace period, and put back the rest."""
        self._board.closing = True
        self._board.tell_waiting()
        await self._runner.stop(grace_seconds)

    async def stop(self) -> None:
        """Close the store; call it when nobody asks any more."""
        await self._runner.stop(0)
        await self._store.close()
        if self._passing is not None:
            self._passing.cleanup()

    async def create(self, request: pb.CreateJobRequest) -> tuple[pb.Job, bool]:
        """Accept a job; or, and then True, find the one that has its idempotency key.

        Raises:
            InvalidArgument, NotFound: as for a generation.
            PermissionDenied, OverLimit: the caller may not have it, or not now.
            AlreadyExists: the key belongs to a job that asks for something else.
            Overloaded: too many wait.
        """
        terms = check(request, self._config)
        known = await self._with_key(terms.key)
        existed = known is not None
        if known is None:
            await self.admission.check(terms.key)
            plan = await make_plan(request.generate, self._mesh)
            new = new_job(terms, request.generate, plan)
            limit = self._config.max_queued_jobs
            if await self._store(Store.queued) >= limit:
                raise Overloaded("jobs", limit, _RETRY_SECONDS)
            record, existed = await self.admission.accept(new, plan)
        else:
            record = known
        if record.digest != terms.digest:
            owner = f"job {record.id}, which asks for something else"
            raise AlreadyExists("idempotency_key", request.idempotency_key, owner)
        self._runner.wake()
        return await self._describe(record), existed

    async def get(self, job: str, pictures: bool = True) -> pb.Job:
        """How a job stands, with the result if it has succeeded, of which the pictures may be left out.

        Raises:
            UnknownJob: there is none of this id.
        """
        return await self._describe(await self._find(job), result=True, pictures=pictures)

    async def page(self, request: pb.ListJobsRequest) -> tuple[list[pb.Job], str]:
        """A page of the jobs that the caller sees, and the token for the next one."""
        wanted, tenant = states(request.states), current_caller().only_tenant
        size = request.page_size or DEFAULT_PAGE
        if size > MAX_PAGE:
            raise InvalidArgument("page_size", size, f"at most {MAX_PAGE}")
        token = request.page_token
        if token and not re.fullmatch(r"[0-9]{1,18}", token, re.ASCII):
            raise InvalidArgument("page_token", token, "next_page_token of an earlier answer")
        before = int(token) if token else None
        records = await self._store(lambda store: store.page(wanted, before, size + 1, tenant))
        more = str(records[size - 1].seq) if len(records) > size else ""
        return [await self._describe(record) for record in records[:size]], more

    async def watch(self, job: str, pictures: bool = True) -> AsyncGenerator[pb.Job, None]:
        """How a job stands, now and whenever that changes, until it is finished; the last has the result.

        Raises:
            UnknownJob: there is none of this id.
            Unavailable: the gateway stops before the job runs.
        """
        with self._board.listen(job) as changed:
            told: pb.Job | None = None
            while True:
                changed.clear()
                running = self._board.running.get(job)
                record = await self._find(job) if running is None else _seen(job, running.record)
                now = await self._describe(record, result=True, pictures=pictures)
                if now != told:
                    told = now
                    yield now
                if now.HasField("finished"):
                    return
                if self._board.closing and running is None:
                    raise Unavailable("gateway", f"stops; job {job} will go on when it is back")
                await changed.wait()

    async def cancel(self, job: str) -> pb.Job:
        """Cancel a job unless it is finished, and tell how it stands now."""
        await self._find(job)
        cancelled = await self._store(lambda store: store.cancel(job, time.time()))
        if cancelled:
            running = self._board.running.get(job)
            if running is not None and running.task is not None:
                running.task.cancel()
                await asyncio.wait((running.task,))
            self._board.tell(job)
            self._board.tell_waiting()
            self._runner.wake()
        return await self._describe(await self._find(job))

    def _tell_waiting(self, waiting: Sequence[Waiting]) -> None:
        found = {one.model: one.jobs for one in waiting}
        for model in self._told_models - set(found):
            self._waiting.labels(self._metrics.service, model).set(0)
        for model, jobs in found.items():
            self._waiting.labels(self._metrics.service, model).set(jobs)
        self._told_models |= set(found)
        self._backlog.set(self._mesh.costs.seconds((one.model, one.amount) for one in waiting))

    async def _with_key(self, key: str | None) -> Record | None:
        tenant = current_caller().tenant
        return None if key is None else await self._store(lambda store: store.find_key(key, tenant))

    async def _find(self, job: str) -> Record:
        return _seen(job, await self._store(lambda store: store.get(job)))

    async def _describe(self, record: Record, result: bool = False, pictures: bool = True) -> pb.Job:
        message = job_message(record)
        running = self._board.running.get(record.id)
        if record.state is State.QUEUED:
            message.position = await self._store(lambda store: store.position(record))
        elif record.state is State.RUNNING and running is not None:
            message.progress.CopyFrom(running.progress)
        elif record.state is State.SUCCEEDED and result:
            message.result.CopyFrom(await self._store(lambda store: store.result(record, pictures)))
        return message

    async def _generate(
        self, job: str, request: gateway_service_pb2.GenerateRequest
    ) -> AsyncGenerator[gateway_service_pb2.GenerateResponse, None]:
        plan = replace(await make_plan(request, self._mesh), id=job)
        async with aclosing(generate(self._mesh, plan, self._metrics)) as events:
            async for event in events:
                yield event


def _seen(job: str, record: Record | None) -> Record:
    """The job's record, if there is one that the caller may see."""
    if record is None or not current_caller().sees(record.tenant):
        raise UnknownJob(job)
    return record


def folder_of(config: GatewayConfig, env: Mapping[str, str] = os.environ) -> Path | None:
    """Where the gateway keeps its jobs; None: nowhere for longer than it runs.

    Without a setting that is a folder of the user's state, named by the address that the gateway listens on, so that
    it finds its jobs again. A gateway on any free port would not, and keeps none.
    """
    if config.jobs_folder:
        return Path(config.jobs_folder)
    if config.listen.rpartition(":")[2] == "0":
        return None
    state = env.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", config.listen).strip("-")
    return Path(state, "imagemesh", "jobs", name)
