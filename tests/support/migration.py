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
    """Return when the gateway has got work to every replica; to one that was away it is connected again in seconds."""
    waiting = {replica.process.pid for replica in found.replicas}
    async with AsyncClient(address) as client:
        while waiting:
            await asyncio.gather(*(client.generate("the cat", seed=seed, steps=2) for seed in range(4)))
            waiting -= {process for process, _, _ in found.record.read()}


async def together(address: str, schedulers: Sequence[str], at_half: Callable[[], Any] = lambda: None) -> Round:
    """A generation a scheduler, all at once, seeds from 0; ``at_half`` is called when the first is half way."""
    seen: list[list[int]] = [[] for _ in schedulers]
    waiting = [at_half]

    def at_step(step: int) -> None:
        if step >= STEPS // 2 and waiting:
            waiting.pop()()

    async with AsyncClient(address) as client:
        works = (_follow(client, seed, name, seen[seed], at_step) for seed, name in enumerate(schedulers))
        return Round(await asyncio.gather(*works), seen)


async def _follow(
    client: AsyncClient, seed: int, scheduler: str, seen: list[int], at_step: Callable[[int], None]
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
                at_step(event.step)
            result = event
    return np.asarray(result.generation.images[0].to_pil())
