"""Who samples next: one generation at a time, first come, first served."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import Overloaded
from imagemesh_runtime.metrics import Metrics


class SamplerQueue:
    """A bounded queue for the one sampler."""

    def __init__(self, max_queue: int, metrics: Metrics) -> None:
        self._max_queue = max_queue
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._present = 0  # waiting and running
        self._seconds_a_run = 1.0  # a running mean, for the retry times of refusals

    def admit(self) -> int:
        """How many generations a newcomer waits for.

        Raises:
            Overloaded: the queue is full.
        """
        if self._present > self._max_queue:
            raise Overloaded(self._metrics.service, self._max_queue, self._seconds_a_run * self._present)
        return self._present

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the sampler and hold it for the block."""
        self._present += 1
        since = perf_counter()
        self._metrics.pending.inc()
        try:
            try:
                await self._lock.acquire()
            finally:
                self._metrics.pending.dec()
            start = perf_counter()
            self._metrics.queue_wait.observe(start - since)
            current_call().queue_seconds += start - since
            try:
                with self._metrics.running.track_inprogress():
                    yield
            finally:
                self._lock.release()
                self._seconds_a_run += 0.2 * (perf_counter() - start - self._seconds_a_run)
        finally:
            self._present -= 1
