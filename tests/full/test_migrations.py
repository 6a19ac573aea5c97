"""Every scheduler goes on at another replica, by kill and by SIGTERM, alone and in shared forwards."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from imagemesh_services.diffusion.schedulers import SCHEDULERS
from tests.support.fleet import Fleet, fleet, gateway_before
from tests.support.migration import EVERY, Round, reached, together
from tests.support.reference import worst
from tests.support.tampered import repeated

NAMES = sorted(SCHEDULERS)
# Eight at a time; the last ones are filled up from the first.
GROUPS = [[NAMES[(i + j) % len(NAMES)] for j in range(8)] for i in range(0, len(NAMES), 8)]
groups = pytest.mark.parametrize("group", GROUPS, ids=[group[0] for group in GROUPS])


class Pair:
    """Two replicas, and what eight generations look like where nobody disturbs them."""

    def __init__(self, replicas: Fleet, address: str) -> None:
        self.replicas, self.address = replicas, address
        self._undisturbed: dict[str, Round] = {}
        self._victim = 0

    async def undisturbed(self, group: Sequence[str]) -> Round:
        if group[0] not in self._undisturbed:
            self.replicas.restart()
            self._undisturbed[group[0]] = await together(self.address, group)
        return self._undisturbed[group[0]]

    async def disturbed(self, group: Sequence[str], how: signal.Signals) -> tuple[Round, dict[int, int], int]:
        """The round, the evaluations done twice by seed, and how many were done; the replicas take turns to go."""
        self.replicas.restart()
        self._victim = 1 - self._victim
        victim = self.replicas.replicas[self._victim].process
        await reached(self.replicas, self.address)
        at_work = self.replicas.record.at_work(victim.pid)
        made = await together(self.address, group, lambda: os.kill(victim.pid, how), at_work)
        assert victim.wait(timeout=120) == (0 if how is signal.SIGTERM else -how)
        done = self.replicas.record.read()
        assert len({process for process, _, _ in done}) == 2  # the one that went had work
        return made, repeated(done), len(done)


@pytest.fixture(scope="module")
def alone(models: Path) -> Iterator[Pair]:
    with fleet("torch", models) as found, gateway_before(found, "torch", models, EVERY) as address:
        yield Pair(found, address)


@pytest.fixture(scope="module")
def shared(models: Path) -> Iterator[Pair]:
    with fleet("torch", models, max_batch=16) as found, gateway_before(found, "torch", models, EVERY) as address:
        yield Pair(found, address)


@groups
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
async def test_byte_by_byte(alone: Pair, group: list[str], how: signal.Signals, figures: dict[str, str]) -> None:
    undisturbed = await alone.undisturbed(group)
    made, twice, count = await alone.disturbed(group, how)
    np.testing.assert_array_equal(made.pictures, undisturbed.pictures)
    limit = EVERY if how is signal.SIGKILL else 0
    assert max(twice.values()) <= limit, twice
    figures[f"{how.name} with {group[0]} and 7 others"] = (
        f"8 of 8 byte-identical; {count} evaluations, {sum(twice.values())} of them done twice "
        f"(at most {max(twice.values())} of one generation, {limit} allowed)"
    )


@groups
async def test_in_shared_forwards(alone: Pair, shared: Pair, group: list[str], figures: dict[str, str]) -> None:
    undisturbed = await alone.undisturbed(group)
    made, twice, _ = await shared.disturbed(group, signal.SIGKILL)
    far = [worst(ours, theirs) for ours, theirs in zip(made.pictures, undisturbed.pictures, strict=True)]
    figures[f"SIGKILL in shared forwards, {group[0]} and 7 others"] = (
        f"at most {max(far)}/255 from alone and undisturbed; {sum(twice.values())} evaluations done twice"
    )
    assert max(far) <= 1, dict(zip(group, far, strict=True))
    assert max(twice.values()) <= EVERY


async def test_a_replica_that_only_stops_answering(alone: Pair, figures: dict[str, str]) -> None:
    group = GROUPS[0]
    undisturbed = await alone.undisturbed(group)
    alone.replicas.restart()
    frozen = alone.replicas.replicas[0].process
    begun = time.monotonic()
    try:
        made = await together(alone.address, group, lambda: os.kill(frozen.pid, signal.SIGSTOP))
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    np.testing.assert_array_equal(made.pictures, undisturbed.pictures)
    figures["SIGSTOP in the middle of 8"] = f"8 of 8 byte-identical after {time.monotonic() - begun:.0f} s"
    await asyncio.to_thread(alone.replicas.wait_ready)
