"""How many rows may run together: a measured knee for each model and size, within one configured bound."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from imagemesh_services.diffusion.pace import Pace, Work


@dataclass(frozen=True)
class Limit:
    """Most rows of one kind together.

    Attributes:
        source: who says so: "tune" (a measurement on file), "ticks" (what the engine measured as it ran) or "max_batch"
            (the configured bound: nothing was measured yet, or the knee lies beyond it).
    """

    rows: int
    source: str


NOTHING: Final[Mapping[Hashable, int]] = MappingProxyType({})


class Limits:
    """The limits in force.

    Args:
        max_rows: the bound, for all kinds together.
        pace: what the ticks tell.
        tuned: the knees that are on file, by kind.
    """

    def __init__(self, max_rows: int, pace: Pace, tuned: Mapping[Hashable, int] = NOTHING) -> None:
        self.max_rows = max_rows
        self._pace = pace
        self._tuned = tuned

    def of(self, kind: Hashable) -> Limit:
        """The limit for that kind: what is on file goes before what the ticks tell."""
        tuned = self._tuned.get(kind)
        rows, source = (tuned, "tune") if tuned is not None else (self._pace.knee(kind), "ticks")
        return Limit(rows, source) if rows is not None and rows <= self.max_rows else Limit(self.max_rows, "max_batch")

    def kinds(self) -> list[Hashable]:
        """The kinds of which something was measured."""
        return list(dict.fromkeys([*self._tuned, *self._pace.kinds()]))

    def room(self, running: Iterable[Work] = ()) -> "Room":
        """What there is of it beside those."""
        room = Room(self)
        for work in running:
            room.add(work)
        return room

    def fits(self, running: Sequence[Work], more: Work) -> bool:
        """Whether ``more`` may run beside those; by itself everything may."""
        return self.room(running).fits(more)


class Room:
    """The rows of those who run, as they come and go."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rows = self._count = 0
        self._of_kind: Counter[Hashable] = Counter()

    def add(self, work: Work) -> None:
        self._count += 1
        self._rows += work.peak
        self._of_kind[work.kind] += work.peak

    def remove(self, work: Work) -> None:
        self._count -= 1
        self._rows -= work.peak
        self._of_kind[work.kind] -= work.peak

    def fits(self, more: Work) -> bool:
        """Whether ``more`` may run beside them; by itself everything may."""
        if not self._count:
            return True
        if self._rows + more.peak > self._limits.max_rows:
            return False
        like = self._of_kind[more.kind]
        return not like or like + more.peak <= self._limits.of(more.kind).rows
