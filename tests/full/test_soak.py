"""Minutes of mixed requests, many of them given up, leave nothing behind: no memory, object, task, thread or file."""

import asyncio
import contextlib
import gc
import itertools
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from imagemesh_cli.host import MeshHost
from imagemesh_client import AsyncClient, Control, MeshError, Progress
from imagemesh_services.diffusion.schedulers import SCHEDULERS
from tests.full.test_parity import a_mask, a_picture
from tests.support.mesh import running_mesh

CALLERS = 6
MINUTES = float(os.environ.get("IMAGEMESH_SOAK_MINUTES", "4"))
SAMPLE_SECONDS = 2.0
# Every prompt is another, so that the kept embeddings, 20 kB each, would fill their 64 MiB through the whole of it.
CACHE_BYTES = 1 << 20
# oneDNN keeps what it compiled for the last 1024 kinds of convolutions, every number of rows being another: of the tiny
# models 1.3 MB for each number and size, in all some 50 MB that would fill up through the soak. Slower is no harm here.
# It reads this when the first convolution is run.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Of the second half of the soak; the first fills what else is kept. Hundreds of requests are made a minute.
MOST_GROWTH = 4.0  # MB a minute
# From half way, when requests are under way, to the end, when none is; a few for each request would be more by far.
MOST_OBJECTS = 1000


@dataclass(frozen=True)
class State:
    """What the process holds."""

    seconds: float
    megabytes: float
    tasks: int
    threads: int
    files: int


def state_of(mesh: MeshHost, begun: float) -> State:
    process = psutil.Process()
    loop = mesh.gateway._loop
    assert loop is not None
    tasks = len(asyncio.all_tasks(loop))
    memory = process.memory_info().rss / 1e6
    return State(time.monotonic() - begun, memory, tasks, process.num_threads(), process.num_fds())


def a_request(numbers: random.Random, control: Image.Image) -> dict[str, Any]:
    """Any mode, scheduler, number of steps, guidance, size and number of pictures."""
    modes: list[dict[str, Any]] = [
        {}, {"n": 3}, {"width": 96, "height": 40}, {"preview_every": 3}, {"image": a_picture(), "strength": 0.6},
        {"image": a_picture(), "mask": a_mask()}, {"controls": [Control(control)]}, {"steps": 0}, {"scheduler": "none"},
    ]  # fmt: skip
    common = {
        "prompt": " ".join(numbers.choices(["red", "cat", "dog", "the", "on"], k=numbers.randint(1, 30))),
        "scheduler": numbers.choice(sorted(SCHEDULERS)),
        "steps": numbers.randint(2, 25),
        "guidance": numbers.choice([1.0, 2.0, 5.0]),
        "seed": numbers.randrange(2**32),
    }
    return {**common, **numbers.choice(modes)}


async def one(client: AsyncClient, numbers: random.Random, control: Image.Image, counts: Counter[str]) -> None:
    """A generation that is finished, given up at some step, or refused; sometimes as a job."""
    request, patience = a_request(numbers, control), numbers.choice([0, 1, 3, 1000, 1000])
    try:
        if numbers.random() < 0.2:
            job = await client.jobs.create(**request)
            if patience < 1000:
                counts[f"jobs, {(await client.jobs.cancel(job.id)).state}"] += 1
                return
            await client.jobs.wait(job.id)
            counts["jobs, finished"] += 1
            return
        async with contextlib.aclosing(client.stream(**request)) as events:
            async for event in events:
                if isinstance(event, Progress) and event.step >= patience:
                    counts["given up"] += 1
                    return
        counts["finished"] += 1
    except MeshError as error:
        if error.code.name not in ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"):
            raise
        counts[f"refused, {error.code.name}"] += 1


def objects() -> int:
    """How many the garbage collector sees that are no garbage."""
    gc.collect()
    return len(gc.get_objects())


async def soak(mesh: MeshHost, control: Image.Image) -> tuple[list[State], int, Counter[str]]:
    """What the process held, every few seconds, its objects half way, and what was asked for."""
    counts: Counter[str] = Counter()
    half = 0
    begun = time.monotonic()
    async with AsyncClient(mesh.grpc_address) as client:

        async def caller(seed: int) -> None:
            numbers = random.Random(seed)
            while time.monotonic() - begun < 60 * MINUTES:
                await one(client, numbers, control, counts)

        callers = [asyncio.create_task(caller(seed)) for seed in range(CALLERS)]
        states = []
        while not all(task.done() for task in callers):
            states.append(state_of(mesh, begun))
            if not half and states[-1].seconds > 30 * MINUTES:
                half = objects()
            await asyncio.wait(callers, timeout=SAMPLE_SECONDS)
        await asyncio.gather(*callers)
    return states, half, counts


async def settled(mesh: MeshHost, tasks: int) -> State:
    """The state once no more tasks are left than there were, or after a minute."""
    for _ in itertools.takewhile(lambda i: i < 600 and state_of(mesh, 0).tasks > tasks, itertools.count()):
        await asyncio.sleep(0.1)
    return state_of(mesh, 0)


@pytest.mark.timeout(7200)
async def test_nothing_grows(
    models: Path, control_image: Image.Image, figures: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMESH_TEXT_ENCODER_CACHE_BYTES", str(CACHE_BYTES))
    with running_mesh(models=str(models), backend="torch") as mesh:
        async with AsyncClient(mesh.grpc_address) as client:
            await client.generate("the cat", steps=3)
        await asyncio.sleep(1)
        before = state_of(mesh, 0)
        states, objects_half, counts = await soak(mesh, control_image)
        after, objects_after = await settled(mesh, before.tasks), objects()
    half = states[len(states) // 2 :]
    slope = float(np.polyfit([one.seconds / 60 for one in half], [one.megabytes for one in half], 1)[0])
    asked = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    figures["requests"] = f"{sum(counts.values())} in {MINUTES:g} minutes: {asked}"
    figures["memory"] = (
        f"{before.megabytes:.0f} MB before, {half[0].megabytes:.0f} MB half way, {after.megabytes:.0f} MB after; "
        f"slope of the second half {slope:+.2f} MB a minute"
    )
    by_minute = {int(one.seconds / 60): one.megabytes for one in states}
    figures["memory at the end of each minute"] = ", ".join(f"{one:.0f}" for one in by_minute.values()) + " MB"
    figures["objects of Python"] = f"{objects_half} half way, {objects_after} after"
    figures["tasks of the event loop"] = f"{before.tasks} before, {after.tasks} after"
    figures["threads"] = f"{before.threads} before, {after.threads} after"
    figures["open files"] = f"{before.files} before, {after.files} after"
    assert min(counts["finished"], counts["given up"]) > 0
    assert after.tasks <= before.tasks
    assert after.threads <= before.threads + 8  # pools fill up to their size
    assert after.files <= before.files + 8
    assert objects_after <= objects_half + MOST_OBJECTS
    assert slope < MOST_GROWTH
