"""Bytes between the sampler and a ControlNet service: three ControlNets of a generation over one.

All that the sampler sends and hears over TCP in a generation of ``STEPS`` steps is counted: pictures and embeddings
once, then latents and residuals. The service adds the residuals up; only the networks are declared.
"""

import asyncio
from typing import Final

from imagemesh_runtime.metrics import Metrics
from imagemesh_services.controlnet.servicer import ControlNetServicer
from imagemesh_services.diffusion.incoming import Incoming
from tests.bench import declared_control
from tests.bench.declared_control import AT_ONCE, Sampler
from tests.bench.harness import Figure
from tests.bench.owners import owner
from tests.bench.transport import SHAPES
from tests.support.steering import moved

STEPS: Final = 20
COUNTS: Final = (1, 3)


async def serve(address: str) -> None:
    """The process of the ControlNet service."""
    await declared_control.serve(address, ControlNetServicer)


def measure(steps: int = STEPS, last: int = 0) -> list[Figure]:
    """Both sets, all of them, or only their ``last`` tensors in full size. Once: bytes don't vary."""
    figures: list[Figure] = []
    with owner("127.0.0.1:0", "tests.bench.several") as address:
        for name in SHAPES:
            one, three = (asyncio.run(_moved(address, name, count, steps, last)) for count in COUNTS)
            what = f"bytes of {steps} steps, {name}"
            figures.append(Figure.of(f"{what}: 1 ControlNet", [one / 1e6], "MB"))
            figures.append(Figure.of(f"{what}: 3 ControlNets", [three / 1e6], "MB"))
            figures.append(Figure.of(f"{what}: 3 / 1", [three / one], "x", "<= 1.02"))
    return figures


async def _moved(address: str, name: str, count: int, steps: int, last: int) -> int:
    """Bytes of all messages, both ways."""
    metrics = Metrics("bench")
    sampler = Sampler(address, name, last, metrics)
    try:
        async with sampler.open(AT_ONCE, count) as control:
            for _ in range(steps):
                await control.residuals(sampler.question(count), Incoming())
    finally:
        await sampler.peer.close()
    return sum(moved(metrics).values())
