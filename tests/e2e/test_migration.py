"""Diffusion replicas as processes: when one is killed, stopped or taken down, its generations go on at another.

What was done where is read from a record that outlives the processes: a line for every evaluation.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from imagemesh_client import AsyncClient, MeshError
from tests.support.fleet import Fleet, fleet, gateway_before
from tests.support.migration import EVERY, Round, reached, together
from tests.support.reference import worst
from tests.support.tampered import DEADLY, EXIT_CODE, repeated

SCHEDULERS = ("DDIM", "Euler a", "DPM++ 2M Karras", "DPM++ SDE", "Heun", "PNDM", "UniPC", "LCM")


@pytest.fixture(scope="module")
def pair(models: Path) -> Iterator[tuple[Fleet, str]]:
    """Two replicas in which nothing shares a forward, so that every picture is its own to the bit."""
    hangs = {"IMAGEMESH_DIFFUSION_HANG_SECONDS": "5"}
    with fleet("torch", models, **hangs) as found, gateway_before(found, "torch", models, EVERY) as address:
        yield found, address


@pytest.fixture(scope="module")
def undisturbed(pair: tuple[Fleet, str]) -> Round:
    return asyncio.run(together(pair[1], SCHEDULERS))


async def test_a_killed_replicas_generations_end_at_the_other_byte_by_byte(
    pair: tuple[Fleet, str], undisturbed: Round
) -> None:
    found, address = pair
    found.restart()
    await reached(found, address)
    victim = found.replicas[0].process
    made = await together(address, SCHEDULERS, victim.kill, found.record.at_work(victim.pid))
    assert victim.wait(timeout=30) < 0
    np.testing.assert_array_equal(made.pictures, undisturbed.pictures)
    done = found.record.read()
    assert max(repeated(done).values()) <= EVERY, repeated(done)
    assert len({process for process, _, _ in done}) == 2  # the killed one had work


async def test_a_stopped_replica_hands_over_and_no_step_is_done_twice(
    pair: tuple[Fleet, str], undisturbed: Round
) -> None:
    found, address = pair
    found.restart()
    await reached(found, address)
    victim, survivor = found.replicas[0].process, found.replicas[1].process
    before = found.metric(1, "imagemesh_step_seconds_count")
    made = await together(address, SCHEDULERS, victim.terminate, found.record.at_work(victim.pid))
    assert victim.wait(timeout=60) == 0
    np.testing.assert_array_equal(made.pictures, undisturbed.pictures)
    assert made.steps == undisturbed.steps
    done = found.record.read()
    assert set(repeated(done).values()) == {0}
    assert len({process for process, _, _ in done}) == 2  # the stopped one had work
    # The record says what the metrics say, of the replica that still has some.
    counted = found.metric(1, "imagemesh_step_seconds_count") - before
    assert counted == sum(process == survivor.pid for process, _, _ in done)


async def test_a_replica_whose_forward_hangs_is_found_out_and_its_generations_end_at_the_other(
    pair: tuple[Fleet, str], undisturbed: Round
) -> None:
    found, address = pair
    found.restart()
    await reached(found, address)
    victim, hang = found.replicas[0], found.record.hang
    try:
        at_work = found.record.at_work(victim.process.pid)
        made = await together(address, SCHEDULERS, lambda: hang.write_text(str(victim.process.pid)), at_work)
        np.testing.assert_array_equal(made.pictures, undisturbed.pictures)
        done = found.record.read()
        assert max(repeated(done).values()) <= EVERY, repeated(done)
        assert len({process for process, _, _ in done}) == 2  # the one that hangs had work
        assert [served(victim.address, name) for name in ("readiness", "liveness")] == [False, False]
        assert [found.metric(i, "imagemesh_lane_hangs") for i in range(2)] == [1, 0]
    finally:
        hang.unlink(missing_ok=True)
    await asyncio.to_thread(victim.wait_ready)  # as soon as the forward ends after all
    assert [found.metric(0, f"imagemesh_lane_{what}") for what in ("hangs", "hung_total")] == [0, 1]


def served(address: str, name: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        told = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)).status
    return bool(told == health_pb2.HealthCheckResponse.SERVING)


async def test_in_shared_forwards_the_pictures_are_the_same_but_for_a_two_hundred_and_fifty_fifth(
    models: Path, undisturbed: Round
) -> None:
    with fleet("torch", models, max_batch=16) as found, gateway_before(found, "torch", models, EVERY) as address:
        victim = found.replicas[0].process
        made = await together(address, SCHEDULERS, victim.kill, found.record.at_work(victim.pid))
        assert victim.wait(timeout=30) < 0
        assert max(repeated(found.record.read()).values()) <= EVERY
    assert worst(made.pictures, undisturbed.pictures) <= 1


async def test_one_that_takes_its_replicas_down_is_stopped_and_its_neighbours_end_well(models: Path) -> None:
    count = 4
    with fleet("fake", models, count, max_batch=16) as found:
        with gateway_before(found, "fake", models, EVERY) as address:
            async with AsyncClient(address) as client:
                works = [client.generate("x", seed=seed, steps=60, guidance=1.0) for seed in (*range(7), DEADLY)]
                *neighbours, deadly = await asyncio.gather(*works, return_exceptions=True)
            assert isinstance(deadly, MeshError)
            assert deadly.code is grpc.StatusCode.UNAVAILABLE
            assert [one for one in neighbours if isinstance(one, BaseException)] == []
            ended = [replica.process.poll() for replica in found.replicas]
        done = found.record.read()
    assert sorted(map(str, ended)) == sorted([str(EXIT_CODE)] * 3 + ["None"])  # two re-placements, and no more
    twice = repeated([one for one in done if one[1] != DEADLY])
    assert max(twice.values()) <= 3 * EVERY, twice
