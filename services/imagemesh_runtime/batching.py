"""Requests that arrive while the device is busy are computed together.

A lone request on an idle device starts at once: a batch forms only from what came in during the batch before. The
oldest request is always in the next batch; younger ones of its key fill what room it leaves. A request may come in
parts, each small enough for a batch; it is taken or refused as a whole.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Generic, TypeVar

from imagemesh_runtime.context import CallContext, current_call, set_current_call
from imagemesh_runtime.errors import Overloaded, Unavailable
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array
from imagemesh_runtime.throughput import Throughput

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Request(Generic[Result]):
    """What one caller waits for: a result a part, or the first part's failure, which ends the others' wait too."""

    result: "asyncio.Future[list[Result]]"
    parts: int
    results: dict[int, Result] = field(default_factory=dict)
    call: CallContext = field(default_factory=current_call)
    # Since when it has been waiting for the device: it came, or a batch with some of its parts ended.
    since: float = field(default_factory=perf_counter)
    begun: bool = False

    def settle(self, index: int, result: Result) -> None:
        self.results[index] = result
        if len(self.results) == self.parts and not self.result.done():
            self.result.set_result([self.results[i] for i in range(self.parts)])

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


@dataclass(eq=False)
class _Part(Generic[Item, Result]):
    key: Hashable
    item: Item
    rows: int
    index: int
    request: _Request[Result]

    @property
    def done(self) -> bool:
        """Nobody waits for it any more: its caller left, or another part failed."""
        return self.request.result.done()


class Batcher(Generic[Item, Result]):
    """Groups items of one key into calls of ``compute(key, items) -> results``, first come, first served.

    Args:
        compute: computes a batch; must answer one result an item, in order.
        max_rows: most rows in a batch; an item of more rows runs alone.
        max_queue: most requests waiting, of however many parts; one more is refused.
        throughput: measures; a batch then has no more rows than pay.
    """

    def __init__(
        self,
        compute: Callable[[Hashable, Sequence[Item]], Awaitable[Sequence[Result]]],
        metrics: Metrics,
        *,
        max_rows: int,
        max_queue: int,
        throughput: Throughput | None = None,
    ) -> None:
        self.max_rows = max_rows
        self._throughput = throughput
        self._compute = compute
        self._metrics = metrics
        self._max_queue = max_queue
        self._queue: deque[_Part[Item, Result]] = deque()
        self._reserved = 0
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._seconds_a_request = 0.1  # a running mean, for the retry times of refusals

    def most_rows(self, key: Hashable) -> int:
        """Most rows in a batch of that key: ``max_rows``, or the knee that was measured."""
        knee = self._throughput.knee(key) if self._throughput is not None else None
        return self.max_rows if knee is None else min(knee, self.max_rows)

    async def submit(self, key: Hashable, item: Item, rows: int = 1) -> Result:
        """Wait for the item's result; ``submit_all`` of one."""
        (result,) = await self.submit_all(key, [item], [rows])
        return result

    async def submit_all(self, key: Hashable, items: Sequence[Item], rows: Sequence[int]) -> list[Result]:
        """Wait for the results of one request's items, which take one place in the queue and stand there in order.

        Raises:
            Overloaded: the queue is full; nothing was done.
            Unavailable: the batcher was closed.
            Exception: an item failed; those of its request that had not begun never do.
        """
        self._check_room()
        if not items:
            return []
        request: _Request[Result] = _Request(asyncio.get_running_loop().create_future(), len(items))
        for index, (item, size) in enumerate(zip(items, rows, strict=True)):
            self._queue.append(_Part(key, item, size, index, request))
        self._count_pending()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            with self._noting_departure():
                return await request.result
        finally:
            self._queue = deque(part for part in self._queue if part.request is not request)
            self._count_pending()

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Hold a place in the queue while the request is being prepared, so that it is refused before that work.

        The place is free again after the block: submit right then, without awaiting anything else.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the batcher was closed.
        """
        self._check_room()
        self._reserved += 1
        self._count_pending()
        try:
            with self._noting_departure():
                yield
        finally:
            self._reserved -= 1
            self._count_pending()

    async def close(self) -> None:
        """Stop; whoever still waits gets Unavailable."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._fail_all(self._queue)

    def _check_room(self) -> None:
        if self._closed:
            raise self._stopped()
        places = self._places()
        if places >= self._max_queue:
            raise Overloaded(self._metrics.service, self._max_queue, max(0.1, self._seconds_a_request * places))

    def _places(self) -> int:
        return self._reserved + len({part.request for part in self._queue if not part.done})

    def _count_pending(self) -> None:
        self._metrics.pending.set(self._places())

    @contextmanager
    def _noting_departure(self) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            if not current_call().expired():
                self._metrics.cancelled.inc()
            raise

    async def _work(self) -> None:
        batch: list[_Part[Item, Result]] = []
        try:
            while batch := self._next_batch():
                requests = _requests(batch)
                start = perf_counter()
                for request in requests:
                    self._note_wait(request, start)
                self._metrics.running.set(len(requests))
                with self._metrics.step.time():
                    await self._run(batch)
                self._metrics.running.set(0)
                end = perf_counter()
                for request in requests:
                    request.since = end
                self._seconds_a_request += 0.2 * ((end - start) / len(requests) - self._seconds_a_request)
        finally:
            self._metrics.running.set(0)
            self._fail_all((*batch, *self._queue))  # nobody, unless this task was cancelled

    def _note_wait(self, request: _Request[Result], start: float) -> None:
        request.call.queue_seconds += start - request.since
        if not request.begun:
            self._metrics.queue_wait.observe(start - request.since)
        request.begun = True

    def _next_batch(self) -> list[_Part[Item, Result]]:
        batch: list[_Part[Item, Result]] = []
        rest: deque[_Part[Item, Result]] = deque()
        rows = most = 0
        for part in self._queue:
            if part.done:
                continue
            most = most or self.most_rows(part.key)
            fits = not batch or (part.key == batch[0].key and rows + part.rows <= most)
            (batch if fits else rest).append(part)
            rows += part.rows if fits else 0
        self._queue = rest
        self._count_pending()
        return batch

    async def _run(self, batch: Sequence[_Part[Item, Result]]) -> None:
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
            for part, result in zip(batch, results, strict=True):
                part.request.settle(part.index, result)

    async def _results(self, batch: Sequence[_Part[Item, Result]]) -> Sequence[Result]:
        """Compute, and charge everybody in the batch for it."""
        call = CallContext()
        set_current_call(call)
        rows = sum(part.rows for part in batch)
        self._metrics.batch_size.observe(rows)
        try:
            results = await self._compute(batch[0].key, [part.item for part in batch])
        finally:
            for request in _requests(batch):
                request.call.queue_seconds += call.queue_seconds
                request.call.compute_seconds += call.compute_seconds
        if len(results) != len(batch):
            raise RuntimeError(f"{len(batch)} items gave {len(results)} results")
        if self._throughput is not None:
            self._throughput.note(batch[0].key, rows, call.compute_seconds)  # waiting for the lane tells nothing
        return results

    async def _fail(self, batch: Sequence[_Part[Item, Result]], error: Exception) -> None:
        """One item's fault is its own: rerun the items alone, and fail only those that fail by themselves."""
        if len(batch) > 1:
            for part in batch:
                if not part.done:
                    await self._run([part])
        else:
            batch[0].request.fail(error)

    def _fail_all(self, parts: Iterable[_Part[Item, Result]]) -> None:
        for part in parts:
            part.request.fail(self._stopped())

    def _stopped(self) -> Unavailable:
        return Unavailable(self._metrics.service, "is stopping")


def _requests(parts: Iterable[_Part[Item, Result]]) -> list[_Request[Result]]:
    """The requests that the parts belong to, each once."""
    return list(dict.fromkeys(part.request for part in parts))


async def submit_rows(batcher: Batcher[Array, Result], key: Hashable, rows: Array) -> list[Result]:
    """The results for the rows, in parts of at most ``max_rows``: no batch is larger, whoever asks.

    Raises: as ``Batcher.submit_all``.
    """
    most = batcher.most_rows(key)
    parts = [rows[i : i + most] for i in range(0, len(rows), most)]
    return await batcher.submit_all(key, parts, [len(part) for part in parts])
