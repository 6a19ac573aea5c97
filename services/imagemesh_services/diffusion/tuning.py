"""Finds the knee of a model at a size: forwards of 1, 2, 4, 8... rows are timed in turns, and a * rows + t fitted."""

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final, Protocol

from imagemesh_services.diffusion.backend import DiffusionModel, Run
from imagemesh_services.diffusion.pace import GAIN, fit, knee

_MEMORY_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


class Memory(Protocol):
    """The host's memory, in bytes."""

    def peak(self) -> int:
        """The most that this process ever had."""

    def left(self) -> int:
        """What is free."""


class HostMemory:
    """As Linux tells it; the control group's limit counts where there is one."""

    def peak(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def left(self) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        try:
            limit, used = (path.read_text().strip() for path in _MEMORY_LIMITS)
        except OSError:
            return free
        return free if limit == "max" else min(free, int(limit) - int(used))


@dataclass(frozen=True)
class Measured:
    """The knee, and what it was found from.

    Attributes:
        seconds: the median of a forward, by rows.
        limited_by: "knee", "memory" or "bound".
    """

    rows: int
    seconds_a_row: float
    seconds_a_forward: float
    seconds: dict[int, float]
    limited_by: str


class _Rows:
    """Runs of one row each at any point of their schedule, as many as are asked for."""

    def __init__(self, model: DiffusionModel, width: int, height: int) -> None:
        self._model = model
        self._inputs = model.trial(width, height)
        self._runs: list[tuple[Run, int]] = []

    def take(self, count: int) -> list[Run]:
        """So many that have an evaluation left."""
        self._runs += [(self._model.start(self._inputs), 0) for _ in range(count - len(self._runs))]
        for i, (run, done) in enumerate(self._runs[:count]):
            self._runs[i] = (run, done + 1) if done < run.evaluations else (self._model.start(self._inputs), 1)
        return [run for run, _ in self._runs[:count]]


def measure(
    model: DiffusionModel,
    width: int,
    height: int,
    *,
    max_rows: int,
    rounds: int,
    clock: Callable[[], float] = perf_counter,
    memory: Memory | None = None,
) -> Measured:
    """Time the model at that size, in pixels; called where nothing else uses the device.

    Args:
        max_rows: more are not tried.
        rounds: forwards of each row count; their median counts.

    Raises:
        Exception: not even a single row can be computed.
    """
    rows = _Rows(model, width, height)

    def seconds(count: int) -> float:
        runs = rows.take(count)
        begun = clock()
        faults = model.advance(runs, [None] * count)
        taken = clock() - begun
        for fault in faults:
            if fault is not None:
                raise fault
        return taken

    counts, limited_by = _climb(seconds, max_rows, memory or HostMemory())
    samples: dict[int, list[float]] = {count: [] for count in counts}
    order = list(counts)
    for _ in range(rounds):
        for count in order:
            samples[count].append(seconds(count))
        order.reverse()
    return _conclude(samples, limited_by)


def _conclude(samples: Mapping[int, Sequence[float]], limited_by: str) -> Measured:
    """The knee from the seconds of every row count; ``limited_by``: what kept from trying more."""
    medians = {count: median(values) for count, values in samples.items()}
    a, t = fit([(count, value) for count, values in samples.items() for value in values])
    found, largest = knee(a, t), max(samples)
    if found is not None and found <= largest:
        limited_by = "knee"
    # A device that slows down beyond some size has no use for more than its best, whatever the line says.
    best = max(samples, key=lambda count: count / medians[count])
    if best < largest:
        largest, limited_by = best, "knee"
    return Measured(min(found or largest, largest), a, t, medians, limited_by)


def _climb(seconds: Callable[[int], float], max_rows: int, memory: Memory) -> tuple[Sequence[int], str]:
    """The row counts worth measuring, and what keeps from more: the bound, memory, or throughput that hardly grows."""
    counts: list[int] = []
    throughput, before = 0.0, memory.peak()
    count = 1
    while count <= max_rows:
        try:
            seconds(count)  # warm up
            now = count / max(min(seconds(count) for _ in range(2)), 1e-9)
        except Exception:
            if not counts:
                raise
            return counts, "memory"
        counts.append(count)
        if count > 1 and now < throughput * (1 + GAIN / 2):
            return counts, "knee"
        throughput = max(throughput, now)
        if memory.peak() - before > memory.left():  # twice the rows take as much again
            return counts, "memory"
        count = min(2 * count, max_rows) if count < max_rows else max_rows + 1
    return counts, "bound"
