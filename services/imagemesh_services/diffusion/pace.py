"""How long work takes here, from how long it took: what the backlog in seconds and the answers at the door rest on.

The time of a tick is fitted as a * rows + t for every model and size: a is what a row costs, t what a forward costs by
itself. Nothing is assumed: before the first tick of a kind its time is unknown.
"""

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import numpy as np

# Beyond the knee no batch, however large, has more throughput by over this much.
GAIN: Final = 0.03

_WINDOW: Final = 64  # ticks that the time of the next is told from
_KINDS: Final = 256  # remembered; callers choose the sizes
# What a knee is told from: so many ticks of each of two row counts or more, none of them older than so many ticks.
_EACH: Final = 8
_MEMORY: Final = 1024


@dataclass(frozen=True)
class Work:
    """What is left of one generation.

    Attributes:
        kind: generations of equal kinds share forwards.
        rows: rows at each of these evaluations.
        own: forwards at each of them that are not shared.
        then: what comes after them, at another cost.
    """

    kind: Hashable
    rows: int
    evaluations: int
    own: int = 0
    then: "Work | None" = None

    @property
    def peak(self) -> int:
        """The most rows of any evaluation."""
        return max(self.rows, self.then.peak if self.then else 0)


@dataclass
class _Kind:
    """What was measured of one kind."""

    ticks: "deque[tuple[float, float]]" = field(default_factory=lambda: deque(maxlen=_WINDOW))
    by_rows: "dict[int, deque[tuple[int, float]]]" = field(default_factory=dict)
    count: int = 0
    fitted: tuple[float, float] | None = None
    knee: int | None = None

    def note(self, rows: int, seconds: float, forwards: int) -> None:
        self.count += 1
        self.fitted = None
        self.ticks.append((rows / forwards, seconds / forwards))
        if forwards > 1:
            return  # of batching they say nothing
        self.by_rows.setdefault(rows, deque(maxlen=2 * _EACH)).append((self.count, seconds))
        if self.count % _EACH == 0:
            self.knee = self._find_knee()

    def _find_knee(self) -> int | None:
        old = self.count - _MEMORY
        self.by_rows = {rows: of for rows, of in self.by_rows.items() if of[-1][0] > old}
        known = [(rows, seconds) for rows, of in self.by_rows.items() if len(of) >= _EACH for _, seconds in of]
        counts = {rows for rows, _ in known}
        return knee(*fit(known)) if len(counts) > 1 and max(counts) >= 2 * min(counts) else None


class Pace:
    """What was measured."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._evaluations: dict[str, float] = {}

    def note(self, kind: Hashable, rows: int, seconds: float, forwards: int = 1) -> None:
        """A tick of so many rows in so many forwards took so long."""
        self._kinds.setdefault(kind, _Kind()).note(rows, seconds, forwards)
        self._kinds.move_to_end(kind)
        if len(self._kinds) > _KINDS:
            self._kinds.popitem(last=False)

    def kinds(self) -> list[Hashable]:
        """Those that ran, the last one last."""
        return list(self._kinds)

    def knee(self, kind: Hashable) -> int | None:
        """The knee as far as ticks tell it; None: not enough of them yet, or there is none.

        What was measured is forgotten when it is old, so that a knee found too low is tried beyond from time to time.
        """
        return self._kinds[kind].knee if kind in self._kinds else None

    def note_evaluations(self, scheduler: str, steps: int, evaluations: int) -> None:
        """So many steps of this scheduler evaluate the model so often."""
        self._evaluations[scheduler] = evaluations / steps

    def evaluations(self, scheduler: str, steps: int) -> int:
        """Evaluations to expect; one a step for a scheduler that hasn't run here."""
        return max(round(steps * self._evaluations.get(scheduler, 1.0)), 1)

    def tick_seconds(self, kind: Hashable, rows: int, forwards: int = 1) -> float | None:
        """Seconds of one tick of so many rows in so many forwards; None: never measured."""
        known = self._kinds.get(kind)
        if known is None:
            return None
        if known.fitted is None:
            known.fitted = fit(known.ticks)
        a, t = known.fitted
        return a * rows + t * forwards


def knee(a: float, t: float) -> int | None:
    """The fewest rows at which throughput is within ``GAIN`` of what any batch can have; None: there is none.

    With a * rows + t seconds a batch, that is rows / (a * rows + t) >= 1 / a / (1 + GAIN).
    """
    return None if a <= 0 else max(math.ceil(t / (a * GAIN) - 1e-9), 1)


def fit(ticks: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Seconds a row and seconds a tick, neither negative, by least squares over the medians of each row count.

    The errors are taken to be in proportion to the times.

    Medians, since on a shared machine a tick now and then takes ten times as long. With one row count alone nothing
    tells the two apart; all is then taken to be the rows'.
    """
    by_rows: dict[float, list[float]] = defaultdict(list)
    for rows, seconds in ticks:
        by_rows[rows].append(seconds)
    if len(by_rows) == 1:  # a lone request's every tick comes here: numpy would take ten times as long
        ((rows, same),) = by_rows.items()
        return median(same) / rows, 0.0
    counts = np.array(sorted(by_rows), dtype=float)
    medians = np.array([median(by_rows[rows]) for rows in counts])
    weights = np.sqrt([len(by_rows[rows]) for rows in counts]) / np.maximum(medians, 1e-9)
    a, t = (float(value) for value in np.polyfit(counts, medians, 1, w=weights))
    if a >= 0 and t >= 0:
        return a, t
    if a < 0:
        return 0.0, float(np.average(medians, weights=weights**2))
    return float((medians / counts).mean()), 0.0
