"""How many rows of a batch pay here, as told by the batches that ran.

Beyond its knee a larger batch only makes everybody in it wait longer. Where the knee lies depends on the model, the
machine and the load, so it is measured while serving: no time is spent on finding it, and nothing is assumed of it.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from statistics import median
from typing import Final

# A smaller batch will do whose throughput is less than the best one's by no more than this.
GAIN: Final = 0.03

_EACH: Final = 8  # batches of so many rows, before they count
_MEMORY: Final = 512  # batches after which those of a count that hasn't come again are forgotten
_KEYS: Final = 64  # remembered; callers choose the sizes of their pictures


class Throughput:
    """What was measured of each kind of batch."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()

    def note(self, key: Hashable, rows: int, seconds: float) -> None:
        """A batch of so many rows took so long."""
        self._kinds.setdefault(key, _Kind()).note(rows, seconds)
        self._kinds.move_to_end(key)
        if len(self._kinds) > _KEYS:
            self._kinds.popitem(last=False)

    def knee(self, key: Hashable) -> int | None:
        """The fewest rows with nearly the best throughput; None: not known yet, or more rows still pay.

        It is forgotten after a while, so that one found too low, when the machine was busy, is tried beyond.
        """
        return self._kinds[key].knee if key in self._kinds else None


class _Kind:
    """What was measured of one."""

    def __init__(self) -> None:
        self.knee: int | None = None
        self._count = 0
        # By rows: when, in batches, and for how long; medians, since on a shared machine some take ten times as long.
        self._batches: dict[int, deque[tuple[int, float]]] = {}

    def note(self, rows: int, seconds: float) -> None:
        self._count += 1
        self._batches.setdefault(rows, deque(maxlen=2 * _EACH)).append((self._count, seconds))
        if self._count % _EACH == 0:
            self._batches = {one: of for one, of in self._batches.items() if of[-1][0] > self._count - _MEMORY}
            self.knee = self._found()

    def _found(self) -> int | None:
        rates = {
            rows: rows / max(median(seconds for _, seconds in of), 1e-9)
            for rows, of in self._batches.items()
            if len(of) >= _EACH
        }
        if not rates:
            return None
        best = max(rates.values())
        fewest = min(rows for rows, rate in rates.items() if rate * (1 + GAIN) >= best)
        # Half as much again and no gain: more would bring none either.
        return fewest if max(rates) >= 1.5 * fewest else None
