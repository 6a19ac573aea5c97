"""Arms interleaved in one run, compared pair by pair, so that what else the machine does hits all of them alike."""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter, process_time


@dataclass(frozen=True)
class Figure:
    """A measured figure: the median of ``samples``, its quartiles, and what it should be."""

    name: str
    unit: str
    median: float
    low: float  # first quartile, or where an interval begins if the name says so
    high: float  # third quartile, or where it ends
    samples: int
    target: str = ""

    @classmethod
    def of(cls, name: str, samples: Sequence[float], unit: str, target: str = "") -> "Figure":
        low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
        return cls(name, unit, median, low, high, len(samples), target)

    @classmethod
    def median_with_interval(cls, name: str, samples: Sequence[float], unit: str, target: str = "") -> "Figure":
        """The median, with the 95% interval that the bootstrap gives for it in place of the quartiles."""
        low, high = bootstrap(samples)
        return cls(name, unit, statistics.median(samples), low, high, len(samples), target)

    def row(self) -> str:
        spread = f"{self.low:.3f} .. {self.high:.3f}"
        return f"{self.name:<58} {self.median:>9.3f} {self.unit:<6} {spread:>20} {self.samples:>4}  {self.target}"

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def bootstrap(samples: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95% percentile interval of the median (Efron, 1979); drawn by a fixed seed, so that it can be told again."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(samples, k=len(samples))) for _ in range(draws))
    return medians[int(draws * 0.025)], medians[int(draws * 0.975) - 1]


HEADER = f"{'figure':<58} {'median':>9} {'unit':<6} {'quartiles':>20} {'n':>4}  target"


@dataclass(frozen=True)
class Cost:
    """Seconds on the wall and of all cores."""

    wall: float
    cpu: float


def interleave(
    arms: Mapping[str, Callable[[], object]], rounds: int, seconds: float = math.inf, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of every arm in every round; each round runs the arms in the opposite order of the one before.

    Args:
        seconds: no other round is begun after so long.
        warm: whether the arms were warmed up already; or else each is run once before.
    """
    costs = interleave_costs(arms, rounds, process_time, seconds, warm=warm)
    return {name: [cost.wall for cost in found] for name, found in costs.items()}


def interleave_costs(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    cpu: Callable[[], float],
    seconds: float = math.inf,
    *,
    warm: bool = False,
) -> dict[str, list[Cost]]:
    """The same with the CPU seconds of whatever processes ``cpu`` counts."""
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    names = list(arms)
    for name in [] if warm else names:
        arms[name]()
    begun = perf_counter()
    for done in range(rounds):
        if done and perf_counter() - begun > seconds:
            break
        for name in names:
            start, spent = perf_counter(), cpu()
            arms[name]()
            costs[name].append(Cost(perf_counter() - start, cpu() - spent))
        names.reverse()
    return costs


def ratios(seconds: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """The first arm's time over the second's, a round each."""
    return [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
