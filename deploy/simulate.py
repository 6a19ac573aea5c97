"""Replay arrivals against the autoscaler's formulas: ``make simulate``, or ``python -m deploy.simulate --help``.

Prints how many replicas there would be, what callers would wait and what it would cost, a line for each target, the
mean over some traces, and draws the first trace at one target over time. How long a generation takes is measured where
a mesh runs (``--metrics``), or told.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from deploy.autoscaling import Policy, Run, simulate

# A quiet half hour, a rush of ten minutes, another quiet half hour: (seconds, share of a replica's work that comes).
DAY = ((1800, 0.4), (600, 2.5), (1800, 0.4))
WIDTH, HEIGHT, LEFT = 900, 150, 60


def main() -> None:
    """Simulate as told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trace", type=Path, help="a file with the second of each arrival on a line; else a made-up rush"
    )
    parser.add_argument("--traces", type=int, choices=range(1, 101), default=6, metavar="N", help="made-up rushes")
    parser.add_argument("--metrics", help="the diffusion service's /metrics, to take a generation's seconds from")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a generation, where no --metrics are given")
    parser.add_argument("--start", type=float, default=60.0, help="seconds until a new replica takes work")
    parser.add_argument("--targets", type=float, nargs="+", default=[10, 20, 30, 60, 120], help="seconds of backlog")
    parser.add_argument("--most", type=int, default=4, help="replicas")
    parser.add_argument("--cost", type=float, default=1.0, help="of a replica's hour")
    parser.add_argument("--draw", type=float, default=30, help="the target that is drawn")
    parser.add_argument("--out", type=Path, default=Path("out/simulate.svg"))
    options = parser.parse_args()
    work = measured(options.metrics) if options.metrics else options.seconds
    traces = [read(options.trace)] if options.trace else [rush(work, seed) for seed in range(options.traces)]
    come = sum(map(len, traces)) / len(traces)
    print(f"{come:.0f} generations of {work:.1f} s; a new replica takes work after {options.start:.0f} s")
    print("target s   replicas   median s   95% s   worst s   replica hours   cost")
    for target in sorted({*options.targets, options.draw}):
        runs = [simulate(trace, work, options.start, Policy(target, most=options.most)) for trace in traces]
        print(f"{target:8.0f} {_line(runs, options.cost)}")
        if target == options.draw:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(picture(runs[0], traces[0], target))
    print(f"drawn: {options.out}")


def _line(runs: Sequence[Run], cost: float) -> str:
    """The means over all traces; of the replicas the most there ever were."""
    most = max(moment.replicas for run in runs for moment in run.moments)
    times = [fmean(run.quantile(q) for run in runs) for q in (0.5, 0.95, 1)]
    hours = fmean(run.replica_hours for run in runs)
    return f"{most:10d} {times[0]:10.0f} {times[1]:7.0f} {times[2]:9.0f} {hours:15.2f} {hours * cost:6.2f}"


def measured(address: str) -> float:
    """The mean seconds of the sampling stage, from a running service's metrics."""
    with urlopen(address, timeout=10) as answer:  # noqa: S310 - the caller's own address
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {
        one.name: one.value for family in families for one in family.samples if one.labels.get("stage") == "sample"
    }
    if not found.get("imagemesh_stage_seconds_count"):
        sys.exit(f"{address} has measured no generation yet")
    return found["imagemesh_stage_seconds_sum"] / found["imagemesh_stage_seconds_count"]


def read(path: Path) -> list[float]:
    """Arrivals, in order, from the first on."""
    times = sorted(float(line) for line in path.read_text().split())
    if not times:
        sys.exit(f"{path} has no arrivals")
    return [time - times[0] for time in times]


def rush(work: float, seed: int = 0) -> list[float]:
    """Arrivals at random (Poisson), as ``DAY`` has it."""
    chance, arrivals, begin = random.Random(seed), [], 0.0
    for seconds, share in DAY:
        at = begin + chance.expovariate(share / work)
        while at < begin + seconds:
            arrivals.append(at)
            at += chance.expovariate(share / work)
        begin += seconds
    return arrivals


def picture(run: Run, arrivals: Sequence[float], target: float) -> str:
    """Arrivals a minute, replicas and backlog over time, as SVG."""
    minutes = range(len(run.moments) // 60)
    came = [sum(60 * minute <= at < 60 * minute + 60 for at in arrivals) for minute in minutes]
    every = [run.moments[60 * minute] for minute in minutes]
    rows = [
        ("arrivals a minute", [float(number) for number in came], "#7a7a7a"),
        (f"replicas (target: {target:.0f} s each)", [float(moment.replicas) for moment in every], "#1f77b4"),
        ("seconds of work that wait", [moment.backlog for moment in every], "#d62728"),
    ]
    parts = [_row(index, *row) for index, row in enumerate(rows)]
    size = f'width="{WIDTH}" height="{len(rows) * HEIGHT + 20}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, *parts, "</svg>", ""])


def _row(index: int, title: str, values: Sequence[float], colour: str) -> str:
    top, most = index * HEIGHT + 25, max(values) or 1.0
    width, height = WIDTH - LEFT - 10, HEIGHT - 45
    step = width / max(len(values) - 1, 1)
    points = " ".join(
        f"{LEFT + i * step:.1f},{top + height * (1 - value / most):.1f}" for i, value in enumerate(values)
    )
    return (
        f'<text x="{LEFT}" y="{top - 8}">{title}</text><text x="5" y="{top + 10}">{most:.0f}</text>'
        f'<text x="5" y="{top + height}">0</text>'
        f'<path d="M{LEFT} {top}V{top + height}H{WIDTH - 10}" fill="none" stroke="#ccc"/>'
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f'<text x="{WIDTH - 90}" y="{top + height + 14}">{len(values)} minutes</text>'
    )


if __name__ == "__main__":
    main()
