"""The mesh's latency over the same models called in one process without gRPC.

A generation's wall time swings by more than the mesh may add on a machine that does other things besides. So the ratio
comes with an interval, and beside it what the mesh adds is told from the mesh's own generations, where the swings
cancel: the share of a generation in which its lane does not compute, and the CPU of whatever else runs meanwhile, which
takes its time from the lane where that uses all cores. Together they are the most that the mesh can add; part of the
second happens within the first.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import diffusers
import torch

from imagemesh_client import Client
from tests.bench.harness import Cost, Figure, interleave_costs
from tests.bench.models import NAME
from tests.bench.up import Up, up

STEPS = 20
PROMPT = "a red fox"
TARGET = 0.03
# Rounds of this bench for one of the others: the ratio needs many.
MORE = 4


@dataclass(frozen=True)
class Part:
    """Of one generation through the mesh, in seconds.

    Attributes:
        wall: as the client has it.
        computed: by the lane, as the services say.
        beside: CPU of the mesh's other threads, and of the client.
    """

    wall: float
    computed: float
    beside: float


def measure(models: Path, rounds: int, name: str = NAME) -> list[Figure]:
    """One arm in this process, one through ``imagemesh up``, in turns; both with a thread a core."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(models / name)
    pipe.set_progress_bar_config(disable=True)
    parts: list[Part] = []

    def in_process() -> None:
        with torch.inference_mode():
            pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=7.5, generator=torch.Generator().manual_seed(1))

    with up(models) as mesh, Client(mesh.address) as client:

        def cpu() -> float:
            return process_time() + mesh.cpu_seconds()

        # A request of each, then of each in the other order: what else the machine does hits both of a pair.
        arms = {"diffusers": in_process, "mesh": lambda: parts.append(part_of(mesh, client, name))}
        costs = interleave_costs(arms, rounds * MORE, cpu)
        require_threads(mesh, torch.get_num_threads())
    return [*_ratios(costs["diffusers"], costs["mesh"]), *_parts(parts[1:])]


def part_of(mesh: Up, client: Client, name: str) -> Part:
    """Generate, and tell who was busy meanwhile."""
    _, before = mesh.lane_and_other_seconds()
    start, own = perf_counter(), process_time()
    made = client.generate(PROMPT, model=name, steps=STEPS, guidance=7.5, seed=1)
    wall, own = perf_counter() - start, process_time() - own
    _, after = mesh.lane_and_other_seconds()
    return Part(wall, sum(timing.compute_seconds for timing in made.timings), after - before + own)


def require_threads(mesh: Up, wanted: int) -> None:
    """Both arms must compute on as many threads, or the ratio says nothing.

    Raises:
        RuntimeError: the mesh's lane uses more or fewer.
    """
    lane, _ = mesh.lane_and_other_seconds()
    busy = sum(seconds > max(lane) / 100 for seconds in lane)
    if busy != wanted:
        raise RuntimeError(f"the mesh computes on {busy} threads, the pipeline in this process on {wanted}")


def _ratios(alone: list[Cost], mesh: list[Cost]) -> list[Figure]:
    pairs = list(zip(mesh, alone, strict=True))
    what = "latency: mesh / in-process"
    # A pair in one order and one in the other.
    quads = [(pairs[i], pairs[i + 1]) for i in range(0, len(pairs) - 1, 2)]
    fours = [sum(ours.wall for ours, _ in quad) / sum(theirs.wall for _, theirs in quad) for quad in quads]
    fastest = min(cost.wall for cost in mesh) / min(cost.wall for cost in alone)
    return [
        Figure.of("latency: diffusers' pipeline in one process", [cost.wall for cost in alone], "s"),
        Figure.of("latency: the mesh (imagemesh up, over gRPC)", [cost.wall for cost in mesh], "s"),
        Figure.of(what, [ours.wall / theirs.wall for ours, theirs in pairs], "x", f"<= {1 + TARGET}"),
        Figure.median_with_interval(f"{what}, ABBA, 95%", fours, "x", f"<= {1 + TARGET}"),
        Figure.of(f"{what}, fastest / fastest", [fastest], "x", f"<= {1 + TARGET}"),
        Figure.of(f"{what}, CPU", [ours.cpu / theirs.cpu for ours, theirs in pairs], "x"),
        Figure.of("latency: what the mesh adds, CPU", [(ours.cpu - theirs.cpu) * 1e3 for ours, theirs in pairs], "ms"),
    ]


def _parts(parts: list[Part]) -> list[Figure]:
    def percent(name: str, samples: list[float], target: str = "") -> Figure:
        return Figure.of(f"latency: {name}", [sample * 100 for sample in samples], "%", target)

    idle = [1 - part.computed / part.wall for part in parts]
    beside = [part.beside / part.wall for part in parts]
    return [
        percent("of a generation, the lane does not compute", idle),
        percent("of a generation, CPU of all but the lane", beside),
        percent("so the mesh adds at most", [a + b for a, b in zip(idle, beside, strict=True)], f"<= {TARGET * 100:g}"),
    ]
