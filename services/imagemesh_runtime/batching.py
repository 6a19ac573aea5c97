"""Requests that arrive while the device is busy are computed together.

A lone request on an idle device starts at once: a batch forms only from what came in during the batch before. The
oldest request is always in the next batch; younger ones of its key fill what room it leaves.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Generic, TypeVar

from imagemesh_runtime.context import CallContext, current_call, set_current_call
from imagemesh_runtime.errors import Overloaded, Unavailable
from imagemesh_runtime.metrics import Metrics

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    key: Hashable
    item: Item
    rows: int
    result: "asyncio.Future[Result]"
    call: CallContext = field(default_factory=current_call)
    since: float = field(default_factory=perf_counter)


class Batcher(Generic[Item, Result]):
    """Groups items of one key into calls of ``compute(key, items) -> results``, first come, first served.

    Args:
        compute: computes a batch; must answer one result an item, in order.
        max_rows: most rows in a batch; an item of more rows runs alone.
        max_queue: most items waiting; one more is refused.
    """

    def __init__(
        self,
        compute: Callable[[Hashable, Sequence[Item]], Awaitable[Sequence[Result]]],
        metrics: Metrics,
        *,
        max_rows: int,
        max_queue: int,
    ) -> None:
        self._compute = compute
        self._metrics = metrics
        self._max_rows = max_rows
        self._max_queue = max_queue
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._seconds_an_item = 0.1  # a running mean, for the retry times of refusals

    async def submit(self, key: Hashable, item: Item, rows: int = 1) -> Result:
        """Wait for the item's result.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the batcher was closed.
        """
        if self._closed:
            raise self._stopped()
        if len(self._queue) >= self._max_queue:
            seconds = max(0.1, self._seconds_an_item * len(self._queue))
            raise Overloaded(self._metrics.service, self._max_queue, seconds)
        waiting: _Waiting[Item, Result] = _Waiting(key, item, rows, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._metrics.pending.set(len(self._queue))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await waiting.result
        except asyncio.CancelledError:
            self._metrics.cancelled.inc()
            self._leave(waiting)
            raise

    async def close(self) -> None:
        """Stop; whoever still waits gets Unavailable."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._fail_all(self._queue)

    def _leave(self, waiting: _Waiting[Item, Result]) -> None:
        if waiting in self._queue:
            self._queue.remove(waiting)
            self._metrics.pending.set(len(self._queue))

    async def _work(self) -> None:
        batch: list[_Waiting[Item, Result]] = []
        try:
            while batch := self._next_batch():
                start = perf_counter()
                for waiting in batch:
                    self._metrics.queue_wait.observe(start - waiting.since)
                    waiting.call.queue_seconds += start - waiting.since
                self._metrics.running.set(len(batch))
                await self._run(batch)
                self._metrics.running.set(0)
                self._seconds_an_item += 0.2 * ((perf_counter() - start) / len(batch) - self._seconds_an_item)
        finally:
            self._metrics.running.set(0)
            self._fail_all((*batch, *self._queue))  # nobody, unless this task was cancelled

    def _next_batch(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        rest: deque[_Waiting[Item, Result]] = deque()
        rows = 0
        for waiting in self._queue:
            if waiting.result.done():
                continue  # its caller left
            fits = not batch or (waiting.key == batch[0].key and rows + waiting.rows <= self._max_rows)
            (batch if fits else rest).append(waiting)
            rows += waiting.rows if fits else 0
        self._queue = rest
        self._metrics.pending.set(len(rest))
        return batch

    async def _run(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        try:
            results = await self._results(batch)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._fail_all(batch)  # not this task: what it waited for was cancelled, as by a lane that closes
        except Exception as error:
            await self._fail(batch, error)
        else:
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.result.done():
                    waiting.result.set_result(result)

    async def _results(self, batch: Sequence[_Waiting[Item, Result]]) -> Sequence[Result]:
        """Compute, and charge everybody in the batch for it."""
        call = CallContext()
        set_current_call(call)
        self._metrics.batch_size.observe(sum(waiting.rows for waiting in batch))
        try:
            results = await self._compute(batch[0].key, [waiting.item for waiting in batch])
        finally:
            for waiting in batch:
                waiting.call.queue_seconds += call.queue_seconds
                waiting.call.compute_seconds += call.compute_seconds
        if len(results) != len(batch):
            raise RuntimeError(f"{len(batch)} items gave {len(results)} results")
        return results

    async def _fail(self, batch: Sequence[_Waiting[Item, Result]], error: Exception) -> None:
        """One item's fault is its own: rerun the items alone, and fail only those that fail by themselves."""
        if len(batch) > 1:
            for waiting in batch:
                if not waiting.result.done():
                    await self._run([waiting])
        elif not batch[0].result.done():
            batch[0].result.set_exception(error)

    def _fail_all(self, waiting: Iterable[_Waiting[Item, Result]]) -> None:
        for one in waiting:
            if not one.result.done():
                one.result.set_exception(self._stopped())

    def _stopped(self) -> Unavailable:
        return Unavailable(self._metrics.service, "is stopping")
