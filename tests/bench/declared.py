"""Engines before a device whose forward takes a declared time, a * rows + t: what is measured is the engine alone."""

import asyncio
import random
import time
from collections.abc import Sequence

import numpy as np

from imagemesh_services.diffusion.backend import Residuals, Run, SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from tests.bench.engines import EngineArm, request
from tests.bench.harness import Figure

STEPS = 20
ROWS = 16


class Device(FakeDiffusionModel):
    """Sleeps; notes when forwards began, what was in them, and when each seed was first.

    The system wakes who sleeps a little late, on a busy machine by many milliseconds. The next forward is shorter by
    that, so that forwards take what is declared on the average, and what is lost beside them is the engine's.
    """

    def __init__(self, a: float, t: float) -> None:
        self.a, self.t = a, t
        self._late = 0.0
        self.forwards: list[tuple[float, float, int]] = []  # begin, end, rows
        self.first: dict[int, float] = {}

    def advance(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Sequence[Exception | None]:
        begun = time.perf_counter()
        for run in runs:
            self.first.setdefault(run._inputs.seeds[0], begun)  # type: ignore[attr-defined]
        until = begun + self.a * len(runs) + self.t - self._late
        faults = super().advance(runs, residuals)
        time.sleep(max(until - time.perf_counter(), 0.0))
        ended = time.perf_counter()
        self._late = max(ended - until, 0.0)
        self.forwards.append((begun, ended, len(runs)))
        return faults


def wait(rounds: int, requests: int = 40, seconds: float = 0.1) -> list[Figure]:
    """Mean wait in steps from arrival to the start of the first forward, where 20-step jobs come now and then.

    A job comes every 20 / 6 steps on the average, at the same moments in both arms: six run at a time.
    """
    step_level, request_level = [], []
    for i in range(rounds):
        numbers = random.Random(i)
        gaps = [numbers.expovariate(6 / STEPS) * seconds for _ in range(requests)]
        arms = [(step_level, _waits_of_engine), (request_level, _waits_of_whole_requests)]
        for found, arm in arms if i % 2 else reversed(arms):
            found.append(arm(gaps, seconds))
    shorter = [whole / step for whole, step in zip(request_level, step_level, strict=True)]
    return [
        Figure.of("wait for the first forward: the engine", step_level, "steps"),
        Figure.of("wait for the first forward: whole requests batched", request_level, "steps"),
        Figure.of("wait for the first forward: times shorter", shorter, "x", ">= 15"),
    ]


def _device(seconds: float) -> Device:
    """A step of the six takes ``seconds``, and one more row hardly longer."""
    return Device(seconds / 100, seconds * 0.94)


def _wait(device: Device, arrived: dict[int, float]) -> float:
    """The mean, in steps; the first job, which finds nobody busy, is left out.

    A step is counted from the beginning of a forward to that of the next, however long this one took.
    """
    begins = [begun for begun, _, _ in device.forwards]
    moments = [(at, device.first[seed]) for seed, at in arrived.items() if seed]
    return float(np.diff(np.interp(moments, begins, range(len(begins)))).mean())


def _waits_of_engine(gaps: Sequence[float], seconds: float) -> float:
    device, arrived = _device(seconds), {}

    async def arrivals(arm: EngineArm) -> None:
        tasks = []
        for seed, gap in enumerate(gaps):
            arrived[seed] = time.perf_counter()
            tasks.append(asyncio.create_task(arm.one(_job(seed))))
            await asyncio.sleep(gap)
        await asyncio.gather(*tasks)

    with EngineArm(device, max_rows=ROWS) as arm:
        arm.run(arrivals(arm))
    return _wait(device, arrived)


def _waits_of_whole_requests(gaps: Sequence[float], seconds: float) -> float:
    """All that wait run together to their end, at most as many as an engine takes; who comes meanwhile waits."""
    device, arrived = _device(seconds), {}
    waiting: list[SampleInputs] = []

    async def serve() -> None:
        done = 0
        while done < len(gaps):
            batch = [waiting.pop(0) for _ in range(min(len(waiting), ROWS))]
            runs = [device.start(inputs) for inputs in batch]
            for _ in range(STEPS if runs else 0):
                await asyncio.to_thread(device.advance, runs, [None] * len(runs))
            done += len(runs)
            await asyncio.sleep(0 if runs else seconds / 100)

    async def both() -> None:
        server = asyncio.create_task(serve())
        for seed, gap in enumerate(gaps):
            arrived[seed] = time.perf_counter()
            waiting.append(_job(seed))
            await asyncio.sleep(gap)
        await server

    asyncio.run(both())
    return _wait(device, arrived)


def capacity(rounds: int, requests: int = 160, a: float = 0.004, t: float = 0.004) -> list[Figure]:
    """Rows a second while there is always somebody waiting, of the 1 / a that a batch of any size could have.

    The engine is bounded at 64 rows and finds its knee by itself, from its ticks; it is asked for far more, since of
    requests that all fit at once none ever waits.
    """
    shares, rows = [], []
    for i in range(rounds):
        numbers, device = random.Random(i), Device(a, t)
        with EngineArm(device, max_rows=64) as arm:
            arm.at_once([_job(seed, 8 * (1 + seed)) for seed in range(4)])  # eight ticks of each of four sizes
            device.forwards.clear()
            device.first.clear()
            arm.at_once([_job(seed, numbers.randint(STEPS // 2, 3 * STEPS // 2)) for seed in range(requests)])
            rows.append(float(max(count for _, _, count in device.forwards)))
        busy = [one for one in device.forwards if one[0] <= max(device.first.values())]
        shares.append(sum(count for _, _, count in busy) / (busy[-1][1] - busy[0][0]) * a)
    return [
        Figure.of("declared device: rows of the largest forward", rows, ""),
        Figure.of("declared device: share of its capacity 1 / a", shares, "", ">= 0.95"),
    ]


def _job(seed: int, steps: int = STEPS) -> SampleInputs:
    return request(4, 64, steps, seed=seed)
