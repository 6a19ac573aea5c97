"""Eight generations at once before a fleet, of which a replica goes away while they run."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagemesh_client import AsyncClient, Progress
from tests.support.fleet import Fleet

EVERY = 3  # evaluations between two checkpoints
STEPS = 12


@dataclass(frozen=True)
class Round:
    """Of each generation: its pixels, and the step that each event told of (one an evaluation)."""

    pictures: Sequence[np.ndarray]
    steps: Sequence[Sequence[int]]


async def reached(found: Fleet, address: str) -> None:
    """Return when the gateway gives work to every replica; to one that was away it is connected again in seconds.

    It does when a generation for each runs on all of them: one that fails, or rests since it failed, has none.
    """
    wanted = {replica.process.pid for replica in found.replicas}
    found.record.read()
    async with AsyncClient(address) as client:
        at_work: set[int] = set()
        while at_work != wanted:
            await asyncio.gather(*(client.generate("the cat", seed=seed, steps=2) for seed in range(len(wanted))))
            at_work = {process for process, _, _ in found.record.read()}


async def together(
    address: str,
    schedulers: Sequence[str],
    at_half: Callable[[], Any] = lambda: None,
    ready: Callable[[], bool] = lambda: True,
) -> Round:
    """A generation a scheduler, all at once, seeds from 0.

    ``at_half`` is called once, at the first step of any at which one is half way and all is ``ready``: on a busy
    machine a replica may not have begun when another's first generation ends.
    """
    seen: list[list[int]] = [[] for _ in schedulers]
    waiting = [at_half]

    def at_step() -> None:
        if waiting and max(map(max, filter(None, seen))) >= STEPS // 2 and ready():
            waiting.pop()()

    async with AsyncClient(address) as client:
        works = (_follow(client, seed, name, seen[seed], at_step) for seed, name in enumerate(schedulers))
        return Round(await asyncio.gather(*works), seen)


async def _follow(
    client: AsyncClient, seed: int, scheduler: str, seen: list[int], at_step: Callable[[], None]
) -> np.ndarray:
    result: Any = None
    # Guidance that is low, since a model of random weights makes of 1e-6 several steps of a pixel where it is high.
    stream = client.stream(
        "the red cat", seed=seed, scheduler=scheduler, steps=STEPS, guidance=2.0, width=64, height=64
    )
    async with contextlib.aclosing(stream) as events:
        async for event in events:
            if isinstance(event, Progress):
                seen.append(event.step)
                at_step()
            result = event
    return np.asarray(result.generation.images[0].to_pil())
