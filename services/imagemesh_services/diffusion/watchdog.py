"""Notices when the lane hangs: what runs on it takes far longer than such work was measured to take.

A thread can't be stopped from outside, so nothing here ends what hangs. Others are told: health, the metrics, and the
callers whose generations can go on at another replica. Should the lane go on after all, so does the service.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Final

from prometheus_client import Counter, Gauge

from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.pace import Pace
from imagemesh_services.diffusion.ticks import Ticks

log = logging.getLogger(__name__)

# So many times the least patience for what was never measured: a first forward, or a model that is being loaded.
UNMEASURED: Final = 10
# Looks in the shortest time that is too long.
_LOOKS: Final = 8


class Watchdog:
    """Watches a lane while there is work for it.

    Args:
        least: seconds that work may take at least, however fast it was measured to be; 0: nothing is watched.
        factor: times what a tick was measured to take.
    """

    def __init__(self, lane: Lane, metrics: Metrics, pace: Pace, *, least: float, factor: float) -> None:
        self.hangs = False
        self._lane = lane
        self._pace = pace
        self._least, self._factor = least, factor
        labels, registry = ("service",), metrics.registry
        self._gauge = Gauge(
            "imagemesh_lane_hangs", "Whether the device's lane hangs: 1, or 0.", labels, registry=registry
        ).labels(metrics.service)  # fmt: skip
        self._count = Counter(
            "imagemesh_lane_hung", "Times that the device's lane began to hang.", labels, registry=registry
        ).labels(metrics.service)  # fmt: skip
        # Tells others that the lane hangs, or no longer does.
        self.on_change: list[Callable[[bool], Awaitable[None]]] = []

    async def watch(
        self, worker: "asyncio.Task[None]", ticks: Callable[[], Ticks | None], give_up: Callable[[], None]
    ) -> None:
        """Look until ``worker`` ends.

        Args:
            ticks: the ones that it is at.
            give_up: called when the lane begins to hang.
        """
        while self._least and not worker.done():
            await asyncio.wait((worker,), timeout=self._least / _LOOKS)
            hangs = not worker.done() and self._hangs(ticks())
            if hangs == self.hangs:
                continue
            await self._tell(hangs)
            if hangs:
                give_up()

    def allowed(self, ticks: Ticks | None) -> float:
        """Seconds that what the lane is at may take."""
        under_way = ticks.under_way if ticks is not None else None
        expected = None
        if ticks is not None and under_way is not None:
            expected = self._pace.tick_seconds(ticks.batch[0].kind, under_way.rows, under_way.forwards)
        return self._least * UNMEASURED if expected is None else max(self._least, self._factor * expected)

    def _hangs(self, ticks: Ticks | None) -> bool:
        since = self._lane.busy_since
        return since is not None and perf_counter() - since > self.allowed(ticks)

    async def _tell(self, hangs: bool) -> None:
        self.hangs = hangs
        self._gauge.set(hangs)
        if hangs:
            self._count.inc()
            log.error("the lane hangs; generations that can go on elsewhere are given up here")
        else:
            log.warning("the lane goes on")
        await asyncio.gather(*(tell(hangs) for tell in self.on_change))
