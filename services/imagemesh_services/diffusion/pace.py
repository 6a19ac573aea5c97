"""How long work takes here, from how long it took: what the backlog in seconds and the answers at the door rest on.

The time of a tick is fitted as a * rows + t for every model and size: a is what a row costs, t what a forward costs by
itself. Nothing is assumed: before the first tick of a kind its time is unknown.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

_WINDOW: Final = 64  # ticks remembered


@dataclass(frozen=True)
class Work:
    """What is left of one generation.

    Attributes:
        kind: generations of equal kinds share forwards.
    """

    kind: Hashable
    rows: int
    evaluations: int


class Pace:
    """What was measured."""

    def __init__(self) -> None:
        self._ticks: dict[Hashable, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._fits: dict[Hashable, tuple[float, float]] = {}
        self._evaluations: dict[str, float] = {}

    def note(self, kind: Hashable, rows: int, seconds: float) -> None:
        """A tick of so many rows took so long."""
        self._ticks[kind].append((rows, seconds))
        self._fits.pop(kind, None)

    def note_evaluations(self, scheduler: str, steps: int, evaluations: int) -> None:
        """So many steps of this scheduler evaluate the model so often."""
        self._evaluations[scheduler] = evaluations / steps

    def evaluations(self, scheduler: str, steps: int) -> int:
        """Evaluations to expect; one a step for a scheduler that hasn't run here."""
        return max(round(steps * self._evaluations.get(scheduler, 1.0)), 1)

    def tick_seconds(self, kind: Hashable, rows: int) -> float | None:
        """Seconds of one tick of so many rows; None: never measured."""
        if kind not in self._ticks:
            return None
        if kind not in self._fits:
            self._fits[kind] = fit(self._ticks[kind])
        a, t = self._fits[kind]
        return a * rows + t


def fit(ticks: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """Seconds a row and seconds a tick, neither negative, by least squares over the medians of each row count.

    Medians, since on a shared machine a tick now and then takes ten times as long. With one row count alone nothing
    tells the two apart; all is then taken to be the rows'.
    """
    by_rows: dict[int, list[float]] = defaultdict(list)
    for rows, seconds in ticks:
        by_rows[rows].append(seconds)
    counts = np.array(sorted(by_rows), dtype=float)
    medians = np.array([median(by_rows[int(rows)]) for rows in counts])
    if len(counts) > 1:
        weights = np.sqrt([len(by_rows[int(rows)]) for rows in counts])
        a, t = (float(value) for value in np.polyfit(counts, medians, 1, w=weights))
        if a >= 0 and t >= 0:
            return a, t
        if a < 0:
            return 0.0, float(np.average(medians, weights=weights**2))
    return float((medians / counts).mean()), 0.0


def finish_times(running: Sequence[Work], waiting: Sequence[Work], max_rows: int, pace: Pace) -> list[float] | None:
    """Seconds until each is done, running ones first: the engine's own rules, played through.

    None: some of it is of a kind that was never measured.
    """
    order = [*running, *waiting]
    left = [work.evaluations for work in order]
    times = [0.0] * len(order)
    active, queue = list(range(len(running))), deque(range(len(running), len(order)))
    now = 0.0
    while active or queue:
        while queue and (not active or sum(order[i].rows for i in (*active, queue[0])) <= max_rows):
            active.append(queue.popleft())
        together: Counter[Hashable] = Counter()
        for i in active:
            together[order[i].kind] += order[i].rows
        seconds = [pace.tick_seconds(kind, rows) for kind, rows in together.items()]
        if any(one is None for one in seconds):
            return None
        rounds = min(left[i] for i in active)
        now += rounds * sum(one for one in seconds if one is not None)
        for i in active:
            left[i] -= rounds
            times[i] = now
        active = [i for i in active if left[i] > 0]
    return times
