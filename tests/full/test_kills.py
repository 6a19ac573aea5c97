"""Dozens of kills under load: nothing that was asked for is lost."""

import asyncio
import itertools
import time
from pathlib import Path

import numpy as np

from imagemesh_client import AsyncClient
from tests.support.fleet import Fleet, fleet, gateway_before
from tests.support.migration import EVERY
from tests.support.tampered import repeated

KILLS, CALLERS = 24, 6
SCHEDULERS = ("DDIM", "Euler a", "DPM++ 2M Karras", "UniPC", "Heun", "LCM")


async def test_two_replicas_killed_in_turns(models: Path, figures: dict[str, str]) -> None:
    with fleet("torch", models, max_batch=16) as found, gateway_before(found, "torch", models, EVERY) as address:
        async with AsyncClient(address) as client:
            over = asyncio.Event()
            callers = [asyncio.create_task(_call(client, i, over)) for i in range(CALLERS)]
            done = [one for i in range(KILLS) for one in await asyncio.to_thread(_kill, found, i % 2)]
            over.set()
            made = sum(await asyncio.gather(*callers))
            done += found.record.read()
    twice = repeated(done)
    figures["kills"] = str(KILLS)
    figures["generations asked for meanwhile, and finished"] = f"{made}, {made}"
    figures["evaluations"] = f"{len(done)}, of which {sum(twice.values())} had been done before"
    assert made >= KILLS
    assert sum(twice.values()) <= KILLS * CALLERS * EVERY


def _kill(found: Fleet, i: int) -> list[tuple[int, int, int]]:
    """Kill a replica once both are at work, and start it again; answers what was done until then."""
    done, working = [], {replica.process.pid for replica in found.replicas}
    while working:
        new = found.record.read()
        working -= {process for process, _, _ in new}
        done += new
        time.sleep(0.05)
    found.replicas[i].process.kill()
    found.replicas[i].process.wait(timeout=60)
    found.restart()
    return done


async def _call(client: AsyncClient, number: int, over: asyncio.Event) -> int:
    """One generation after another until it is over; answers how many."""
    for i in itertools.count():
        if over.is_set():
            return i
        made = await client.generate(
            "the cat", seed=1000 * number + i, scheduler=SCHEDULERS[number], steps=40, guidance=2.0
        )
        assert np.ptp(np.asarray(made.images[0].to_pil())) > 0
    raise AssertionError
