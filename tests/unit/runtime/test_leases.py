"""What a lease promises: no range is rewritten that is still read, and none is lost."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from imagemesh.v1 import vae_service_pb2 as pb
from imagemesh_runtime import leases
from imagemesh_runtime.arena import PAGE
from imagemesh_runtime.leases import Broken, Lease
from imagemesh_runtime.parcels import Parcel

GOES_ON = -1


@pytest.fixture
def lease() -> Iterator[Lease]:
    lease = Lease(4 * PAGE)
    yield lease
    os.close(lease.arena.descriptor)
    lease.close()


def parcel(pages: int, value: int = 1) -> Parcel[Any]:
    made = Parcel[pb.DecodeLatentsResponse]()
    array = np.full(pages * PAGE, value, np.uint8)
    return made.seal(pb.DecodeLatentsResponse(images=made.add(array), backend="x"))


def where(placed: Parcel[Any]) -> Any:
    return placed.message.images.shared_memory


async def test_a_placed_parcel_says_where_its_payload_is(lease: Lease) -> None:
    shelf = lease.enter(1)
    for number, pages in ((1, 1), (2, 2)):
        placed = parcel(pages, number)
        assert await lease.place(shelf, placed)
        assert where(placed).generation == number
        assert where(placed).length == pages * PAGE
        assert lease.arena._bytes[where(placed).offset] == number
        assert placed.moved() == [("protobuf", placed.message.ByteSize()), ("shm", pages * PAGE)]
    assert lease.arena.in_use == 3 * PAGE


async def test_a_full_arena_waits_until_the_client_lets_go(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_PATIENCE_SECONDS", 30.0)
    shelf = lease.enter(1)
    assert await lease.place(shelf, parcel(4, 1))
    second = asyncio.create_task(lease.place(shelf, parcel(2, 2)))
    lease.report(1, 0, GOES_ON)
    await asyncio.sleep(0)
    assert not second.done()
    assert lease.arena._bytes[0] == 1  # not rewritten
    lease.report(1, 1, GOES_ON)
    assert await second
    assert lease.arena._bytes[0] == 2


async def test_a_message_that_finds_no_room_in_time_goes_another_way(
    lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_PATIENCE_SECONDS", 0.01)
    shelf = lease.enter(1)
    assert await lease.place(shelf, parcel(3))
    stays = parcel(2)
    assert not await lease.place(shelf, stays)
    assert stays.moved()[0][0] == "raw"
    assert shelf.sent == 1


async def test_a_message_larger_than_the_arena_does_not_wait(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_PATIENCE_SECONDS", 3600.0)
    assert not await lease.place(lease.enter(1), parcel(5))


async def test_messages_that_never_arrived_are_freed_when_the_call_is_over(lease: Lease) -> None:
    shelf = lease.enter(1)
    for _ in range(3):
        await lease.place(shelf, parcel(1))
    lease.report(1, 0, 1)  # over, one was seen
    assert lease.arena.in_use == PAGE
    assert not await lease.place(shelf, parcel(1))
    lease.leave(1)
    lease.report(1, 1, 1)
    assert lease.arena.in_use == 0
    assert lease._shelves == {}


async def test_a_call_that_was_over_before_it_began_gets_nothing(lease: Lease) -> None:
    lease.report(7, 0, 0)
    shelf = lease.enter(7)
    assert not await lease.place(shelf, parcel(1))
    lease.leave(7)
    assert lease._shelves == {}


async def test_what_one_call_holds_does_not_keep_anothers(lease: Lease) -> None:
    held, other = lease.enter(1), lease.enter(2)
    await lease.place(held, parcel(1))
    for number in range(1, 10):
        assert await lease.place(other, parcel(3))
        lease.report(2, number, GOES_ON)
    assert lease.arena.in_use == PAGE


@pytest.mark.parametrize(("freed", "seen"), [(2, GOES_ON), (0, 2), (2**64 - 1, GOES_ON)])
async def test_reports_of_messages_that_were_not_sent_break_the_lease(lease: Lease, freed: int, seen: int) -> None:
    await lease.place(lease.enter(1), parcel(1))
    with pytest.raises(Broken, match="call 1 has 1 messages"):
        lease.report(1, freed, seen)


async def test_who_waits_for_room_is_let_go_when_the_lease_ends(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_PATIENCE_SECONDS", 3600.0)
    shelf = lease.enter(1)
    await lease.place(shelf, parcel(4))
    waiting = asyncio.create_task(lease.place(shelf, parcel(1)))
    await asyncio.sleep(0)
    lease.close()
    assert not await asyncio.wait_for(waiting, 10)
