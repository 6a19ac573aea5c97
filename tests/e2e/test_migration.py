"""Two diffusion replicas: when one is killed or stopped, its generations go on at the other.

Nothing shares a forward here: what does differs by 1e-6 from what does not, and a model of random weights can make that
several steps of a pixel, in undisturbed runs as well.
"""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagemesh_client import AsyncClient, Progress
from tests.support.mesh import running_mesh
from tests.support.processes import Process, start

SCHEDULERS = ("DDIM", "Euler a", "DPM++ 2M Karras", "DPM++ SDE", "Heun", "PNDM", "UniPC", "LCM")
STEPS, EVERY = 16, 3


@contextmanager
def replicas(models: Path, folder: Path) -> Iterator[list[Process]]:
    """Two diffusion services, each a process of its own."""
    settings = {
        "IMAGEMESH_MODELS": str(models), "IMAGEMESH_METRICS_LISTEN": "127.0.0.1:0",
        "IMAGEMESH_ADMIN_LISTEN": "127.0.0.1:0", "IMAGEMESH_BACKEND": "torch", "IMAGEMESH_THREADS": "1",
        "IMAGEMESH_MAX_BATCH": "1",
    }  # fmt: skip
    with ExitStack() as stack:
        found = [stack.enter_context(start("diffusion", f"unix:{folder}/{i}.sock", settings)) for i in range(2)]
        for process in found:
            process.wait_ready()
        yield found


@contextmanager
def gateway_before(found: list[Process], models: Path) -> Iterator[str]:
    """The rest of the mesh; answers the gateway's address."""
    gateway = {"diffusion": ",".join(one.address for one in found), "checkpoint_every": str(EVERY)}
    with running_mesh(gateway, without=["diffusion"], backend="torch", models=str(models), max_batch="1") as mesh:
        yield mesh.grpc_address


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


async def follow(client: AsyncClient, seed: int, scheduler: str, steps_seen: list[int], at_step: Any) -> np.ndarray:
    """Generate, tell of each step, and return the pixels."""
    result: Any = None
    stream = client.stream(
        "the red cat", seed=seed, scheduler=scheduler, steps=STEPS, guidance=3.0, width=64, height=64
    )
    async with contextlib.aclosing(stream) as events:
        async for event in events:
            if isinstance(event, Progress):
                steps_seen.append(event.step)
                at_step(event.step)
            result = event
    return np.asarray(result.generation.images[0].to_pil())


async def eight(address: str, at_step: Any = lambda step: None) -> tuple[list[np.ndarray], list[list[int]]]:
    """Eight generations at once, each with another scheduler, and the steps that each was told of."""
    seen: list[list[int]] = [[] for _ in SCHEDULERS]
    async with AsyncClient(address) as client:
        made = await asyncio.gather(*(follow(client, i, name, seen[i], at_step) for i, name in enumerate(SCHEDULERS)))
    return list(made), seen


def once_at(step: int, act: Any) -> Any:
    """Calls ``act`` when the first generation gets to this step."""
    waiting = [act]

    def at_step(now: int) -> None:
        if now >= step and waiting:
            waiting.pop()()

    return at_step


async def test_a_killed_replicas_generations_end_at_the_other_byte_by_byte(models: Path, folder: Path) -> None:
    with replicas(models, folder) as found, gateway_before(found, models) as address:
        wanted, undisturbed = await eight(address)
        victim = found[0].process
        made, seen = await eight(address, once_at(STEPS // 2, lambda: os.kill(victim.pid, signal.SIGKILL)))
        assert victim.wait(timeout=10) == -signal.SIGKILL
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for steps, evaluations in zip(seen, undisturbed, strict=True):
        assert 0 <= len(steps) - len(evaluations) <= EVERY, steps  # an event tells of each evaluation
    assert seen != undisturbed  # the killed one had work


async def test_a_stopped_replica_hands_over_and_no_step_is_done_twice(models: Path, folder: Path) -> None:
    with replicas(models, folder) as found, gateway_before(found, models) as address:
        wanted, undisturbed = await eight(address)
        victim = found[0].process
        made, seen = await eight(address, once_at(STEPS // 2, victim.terminate))
        assert victim.wait(timeout=30) == 0
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert seen == undisturbed  # an event tells of each evaluation
