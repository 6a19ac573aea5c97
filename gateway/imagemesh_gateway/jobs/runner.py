"""Runs the jobs of the store: a few at a time, each as often as it takes, each committed once."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress

import grpc

from imagemesh.v1 import gateway_service_pb2
from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.jobs.board import Board, Running
from imagemesh_gateway.jobs.record import Record, Waiting
from imagemesh_gateway.jobs.store import Store
from imagemesh_gateway.jobs.store_thread import StoreThread
from imagemesh_runtime.context import CallContext, Trace, set_current_call
from imagemesh_runtime.errors import DeadlineExceeded, Deadly, InternalError, MeshError, Unavailable
from imagemesh_runtime.tracing import Spans

log = logging.getLogger(__name__)

Events = AsyncGenerator[gateway_service_pb2.GenerateResponse, None]
# Makes the pictures of a request for the job of that id.
Generate = Callable[[str, gateway_service_pb2.GenerateRequest], Events]

# Attempts that may fail for a reason that passes, before the job fails for it.
MAX_FAILURES = 5
_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 30.0
# The store is looked at at least so often.
_IDLE_SECONDS = 60.0


class Runner:
    """The only one in this process to claim jobs.

    Args:
        at_a_time: most jobs in work.
        starting: answers how many of them may be such that nothing is sampled of yet; the others wait in the store,
            where they can be put in order, cancelled and found again after a crash.
        tell_waiting: is told what waits there, whenever that changes.
        spans: makes one of each attempt; None: nobody wants them.
    """

    def __init__(
        self,
        store: StoreThread,
        board: Board,
        generate: Generate,
        at_a_time: int,
        starting: Callable[[], int],
        tell_waiting: Callable[[Sequence[Waiting]], None] = lambda waiting: None,
        spans: Spans | None = None,
    ) -> None:
        self._spans = spans
        self._store = store
        self._board = board
        self._generate = generate
        self._at_a_time = at_a_time
        self._starting = starting
        self._tell_waiting = tell_waiting
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to claim jobs."""
        self._loop = asyncio.create_task(self._run(), name="jobs")

    async def stop(self, grace_seconds: float) -> None:
        """Claim no more, let what runs end within the grace period, and put back the rest."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        tasks = [running.task for running in self._board.running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """There may be something to claim."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._tidy()
                while self._has_room():
                    record = await self._store(lambda store: store.claim(time.time()))
                    if record is None:
                        break
                    self._begin(record)
                self._tell_waiting(await self._store(Store.waiting))
                at = await self._store(lambda store: store.next_event())
            except Exception:
                log.exception("the store of jobs failed; trying again")
                at = time.time() + _RETRY_SECONDS
            pause = _IDLE_SECONDS if at is None else min(max(at - time.time(), 0.01), _IDLE_SECONDS)
            if not self._has_room():
                pause = max(pause, _RETRY_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):  # Python 3.11's wait_for may swallow that it is cancelled
                    await self._wake.wait()

    def _has_room(self) -> bool:
        running = self._board.running.values()
        return len(running) < self._at_a_time and sum(not one.begun for one in running) < self._starting()

    async def _tidy(self) -> None:
        """Fail what waited too long, forget what was kept long enough, and put back what a full disk left behind."""
        now = time.time()
        code, message = grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "job: its deadline passed while it was queued"
        for job in await self._store(lambda store: store.expire_waiting(now, code, message)):
            self._board.tell(job)
        for job in await self._store(lambda store: store.forget(now)):
            self._board.tell(job)
        known = set(self._board.running)
        for job in await self._store(lambda store: store.put_back_strays(known, now + _MAX_RETRY_SECONDS)):
            log.error("job %s was left by its attempt; it waits for another one", job)

    def _begin(self, record: Record) -> None:
        running = Running(record)
        self._board.running[record.id] = running
        running.task = asyncio.create_task(self._attempt(running), name=f"job {record.id}")
        self._board.tell(record.id)
        self._board.tell_waiting()

    async def _attempt(self, running: Running) -> None:
        record = running.record
        remaining = None if record.deadline is None else record.deadline - time.time()
        try:
            async with asyncio.timeout(remaining):
                result = await self._result(running, remaining)
            await self._store(lambda store: store.succeed(record.id, record.fence, result, time.time()))
        except asyncio.CancelledError:  # the job was cancelled, or the gateway stops
            await self._put_back(record, 0.0, failed=False)
        except TimeoutError:
            await self._fail(record, DeadlineExceeded("job", "it was not finished by its deadline"))
        except MeshError as error:
            await self._retry_or_fail(record, error)
        except Exception as error:
            error_id = secrets.token_hex(8)
            log.error("job %s failed, error id %s", record.id, error_id, exc_info=error)
            await self._fail(record, InternalError(error_id))
        finally:
            del self._board.running[record.id]
            self._board.tell(record.id)
            self.wake()

    async def _result(self, running: Running, remaining: float | None) -> gateway_service_pb2.GenerateResult:
        record = running.record
        deadline = None if remaining is None else time.monotonic() + remaining
        with self._trace(record) as trace:
            set_current_call(CallContext(trace, deadline))
            return await self._made(running)

    async def _made(self, running: Running) -> gateway_service_pb2.GenerateResult:
        record = running.record
        data = await self._store(lambda store: store.request(record.id))
        request = gateway_service_pb2.GenerateRequest.FromString(data)
        async with aclosing(self._generate(record.id, request)) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "result":
                    return event.result
                if kind == "progress":
                    told = event.progress
                    running.progress = pb.JobProgress(step=told.step, steps=told.steps, previews=told.previews)
                    self._board.tell(record.id)
                    if not running.begun:
                        running.begun = True
                        self.wake()
        raise Unavailable("gateway", "ended the generation without a result")

    @contextmanager
    def _trace(self, record: Record) -> Iterator[Trace]:
        """An attempt belongs to the trace of whoever created the job."""
        parent = Trace.parse(record.trace)
        if self._spans is None:
            yield parent.child() if parent else Trace.start()
            return
        told: dict[str, str | int] = {"imagemesh.job": record.id, "imagemesh.attempt": record.fence}
        with self._spans.span("job", "internal", parent, told) as span:
            yield span.trace

    async def _retry_or_fail(self, record: Record, error: MeshError) -> None:
        """A service that is away or full may be back later; the job has time, unless it has a deadline.

        One that its samplers may have broken down of has had its attempts.
        """
        pause = error.retry_after()
        if pause is None and error.code is grpc.StatusCode.UNAVAILABLE and not isinstance(error, Deadly):
            pause = min(_RETRY_SECONDS * 2**record.failures, _MAX_RETRY_SECONDS)
        # A full queue says that others are ahead, which is nobody's failure.
        failed = error.code is grpc.StatusCode.UNAVAILABLE
        if pause is None or (failed and record.failures + 1 >= MAX_FAILURES):
            await self._fail(record, error)
            return
        log.warning("job %s waits %.1f s for another attempt: %s", record.id, pause, error)
        await self._put_back(record, time.time() + pause, failed=failed)

    async def _put_back(self, record: Record, not_before: float, failed: bool) -> None:
        await self._store(lambda store: store.put_back(record.id, record.fence, not_before, failed))

    async def _fail(self, record: Record, error: MeshError) -> None:
        code, message = error.code.value[0], str(error)
        await self._store(lambda store: store.fail(record.id, record.fence, code, message, time.time()))
