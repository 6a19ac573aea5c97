"""Seconds until work is done: the engine's own rules, played through."""

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Final

from imagemesh_runtime.errors import DeadlineExceeded, TooMuchAhead
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.generation import Generation
from imagemesh_services.diffusion.limits import Limits
from imagemesh_services.diffusion.pace import Pace, Work

# A deadline is taken to be missed only beyond this much of what is left to it: estimates err.
_SURE: Final = 1.25


class Outlook:
    """What an engine tells of the time that its work takes, to those who ask at the door and in the metrics."""

    def __init__(self, limits: Limits, pace: Pace, metrics: Metrics) -> None:
        self._limits, self._pace = limits, pace
        self._service = metrics.service
        self._backlog = metrics.backlog.labels(metrics.service)

    def tell(self, running: Iterable[Generation], waiting: Iterable[Generation]) -> None:
        """Set the backlog in seconds; 0 where it is not known yet."""
        self._backlog.set(max(self.times(running, waiting) or (), default=0.0))

    def times(self, running: Iterable[Generation], waiting: Iterable[Generation]) -> list[float] | None:
        """Seconds until each of those who run, and then of those who wait, is done; None: not known yet."""
        run, wait = ([one.left(self._pace) for one in some if not one.gone] for some in (running, waiting))
        return finish_times(run, wait, self._limits, self._pace)

    def check_deadline(
        self, generation: Generation, running: Iterable[Generation], ahead: Iterable[Generation]
    ) -> None:
        """Refuse now what would be thrown away later.

        Raises:
            DeadlineExceeded: it takes longer by itself than its deadline allows.
            TooMuchAhead: it does because of what is ahead.
        """
        remaining = generation.call.remaining()
        times = self.times(running, [*ahead, generation]) if remaining is not None else None
        if remaining is None or times is None or times[-1] <= remaining * _SURE:
            return
        own = (self.times((), (generation,)) or [0.0])[0]
        if own > remaining * _SURE:
            message = f"the generation takes about {own:.1f} s, and its deadline is in {remaining:.1f} s"
            raise DeadlineExceeded(self._service, message)
        raise TooMuchAhead(self._service, times[-1] - own, own, remaining)


def finish_times(running: Sequence[Work], waiting: Sequence[Work], limits: Limits, pace: Pace) -> list[float] | None:
    """Seconds until each is done, running ones first.

    It takes n log n steps for n generations, since it is asked for whenever one comes or goes.

    None: some of it is of a kind that was never measured.
    """
    order: list[Work] = [*running, *waiting]
    queue = deque(range(len(running), len(order)))
    times = [0.0] * len(order)
    room, load = limits.room(), _Load(pace)
    ends: list[tuple[int, int]] = []  # of each that runs, and the round after which its stretch ends: a heap
    now, behind = 0.0, 0

    def enter(i: int) -> None:
        room.add(order[i])
        load.add(order[i])
        heappush(ends, (behind + order[i].evaluations, i))

    for i in range(len(running)):
        enter(i)
    while ends or queue:
        while queue and room.fits(order[queue[0]]):
            enter(queue.popleft())
        seconds = load.seconds()
        if seconds is None:
            return None
        now, behind = now + (ends[0][0] - behind) * seconds, ends[0][0]
        while ends and ends[0][0] == behind:
            _, i = heappop(ends)
            times[i], over = now, order[i]
            room.remove(over)
            load.remove(over)
            if over.then is not None:
                order[i] = over.then
                enter(i)
    return times


class _Load:
    """What a round costs in which each of those who run does one evaluation."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._rows: Counter[Hashable] = Counter()
        self._own: Counter[Hashable] = Counter()
        self._count: Counter[Hashable] = Counter()

    def add(self, work: Work) -> None:
        self._rows[work.kind] += work.rows
        self._own[work.kind] += work.own
        self._count[work.kind] += 1

    def remove(self, work: Work) -> None:
        self._rows[work.kind] -= work.rows
        self._own[work.kind] -= work.own
        self._count[work.kind] -= 1

    def seconds(self) -> float | None:
        """None: some of it was never measured."""
        total = 0.0
        for kind, count in self._count.items():
            if count:
                seconds = self._pace.tick_seconds(kind, self._rows[kind], 1 + self._own[kind])
                if seconds is None:
                    return None
                total += seconds
        return total
