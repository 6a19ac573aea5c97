"""What the sampler waits for residuals in a step: sent block by block or, as Katz sends them, after the forward.

Two processes over TCP: here the sampler's side, there the ControlNet service, both as they are; only what would be
computed is declared (see ``declared_control``), and the UNet's down path, which is the same network, sleeps as long as
the ControlNet. The sender paces what it sends as a link would. The arms differ in when the residuals of a block
leave, and in nothing else.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.control import Control, Question
from imagemesh_services.diffusion.incoming import Incoming, Patience
from tests.bench import declared_control
from tests.bench.declared_control import AFTERWARDS, BY_BLOCK, PATIENCE, SLOWER, Paced, Sampler, wire_seconds
from tests.bench.harness import Figure, ratios
from tests.bench.owners import owner
from tests.bench.transport import SHAPES

WAYS: Final = (AFTERWARDS, BY_BLOCK)
TARGETS: Final = {"SD1.5 512x512": ">= 10", "SDXL 1024x1024": ">= 8"}


async def serve(address: str) -> None:
    """The process of the ControlNet service."""
    await declared_control.serve(address, Paced)


def measure(rounds: int, last: int = 0) -> list[Figure]:
    """Both sets, all of them, or only their ``last`` tensors in full size."""
    figures: list[Figure] = []
    with owner("127.0.0.1:0", "tests.bench.stall") as address:
        for name in SHAPES:
            seconds = asyncio.run(_stalls(address, name, rounds, last))
            wire = wire_seconds(name, last)
            what = f"stall, {name}"
            figures.append(Figure.of(f"{what}: residuals on the wire, declared", [wire * 1e3], "ms"))
            figures.append(Figure.of(f"{what}: ControlNet's forward, declared", [SLOWER * wire * 1e3], "ms"))
            figures += [Figure.of(f"{what}: {way}", [one * 1e3 for one in seconds[way]], "ms") for way in WAYS]
            figures.append(Figure.of(f"{what}: times less", ratios(seconds, *WAYS), "x", TARGETS[name]))
    return figures


async def _stalls(address: str, name: str, rounds: int, last: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, in alternating order: a step of a generation each."""
    stalls: dict[str, list[float]] = {way: [] for way in WAYS}
    sampler = Sampler(address, name, last, Metrics("bench"))
    down_path = SLOWER * wire_seconds(name, last)
    try:
        async with sampler.open(AFTERWARDS) as one, sampler.open(BY_BLOCK) as other:
            controls: Sequence[tuple[str, Control]] = list(zip(WAYS, (one, other), strict=True))
            for i in range(-1, rounds):  # the first warms up
                for way, control in controls if i % 2 else reversed(controls):
                    found = await _stall(control, sampler.question(), down_path)
                    stalls[way] += [found] if i >= 0 else []
    finally:
        await sampler.peer.close()
    return stalls


async def _stall(control: Control, question: Question, down_path: float) -> float:
    """What a step takes from the question until the UNet's up path can begin, without what the down path takes.

    The forward begins when the ControlNet's has, as the engine begins it, and waits for residuals when its middle
    block is done.
    """
    incoming, begun = Incoming(), asyncio.Event()
    incoming.patience = Patience(PATIENCE)

    def forward() -> None:
        time.sleep(down_path)
        _ = incoming.mid

    asked = time.perf_counter()
    asking = asyncio.create_task(control.residuals(question, incoming, begun.set))
    waiting = asyncio.create_task(begun.wait())
    try:
        await asyncio.wait([asking, waiting], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(forward)
        return time.perf_counter() - asked - down_path
    finally:
        waiting.cancel()
        await asking  # an error of its own says more than that nothing came
