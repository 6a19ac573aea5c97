"""Shared memory when either side dies, lies or leaves: nothing is lost, kept or shown that should not be."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh.v1 import tensor_pb2, transport_service_pb2, transport_service_pb2_grpc
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.errors import InvalidArgument, Unavailable
from imagemesh_runtime.leases import HEADER, REPORT
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel, takes_parcels
from imagemesh_runtime.server import MeshServer
from tests.support.processes import start
from tests.support.sizes import ROOT
from tests.support.steering import SAMPLE, Steered, ask, moved, peering, steer, steered, until

FAKE = {"IMAGEMESH_BACKEND": "fake", "IMAGEMESH_METRICS_LISTEN": "127.0.0.1:0", "IMAGEMESH_ADMIN_LISTEN": "127.0.0.1:0"}
SESSIONS = 1000
LEASES = 200


def mappings() -> int:
    """Arenas that this process has mapped."""
    return sum("memfd:imagemesh" in line for line in Path("/proc/self/maps").read_text().splitlines())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Any:
    """No test leaves anything under /dev/shm, nor an arena mapped; told how many there were of tests before."""
    gc.collect()
    before, mapped = sorted(os.listdir("/dev/shm")), mappings()
    yield mapped
    gc.collect()
    assert sorted(os.listdir("/dev/shm")) == before
    assert mappings() <= mapped


async def test_a_thousand_sessions_leak_no_descriptor_mapping_or_thread() -> None:
    async with steered() as sampler:

        async def session(number: int) -> None:
            """Some end well, some are dropped with an answer on its way."""
            with pytest.raises(ZeroDivisionError) if number % 2 else nullcontext():
                async with sampler.control(1.0) as control:
                    await ask(control)
                    if number % 2:
                        asyncio.create_task(ask(control)).cancel()
                        raise ZeroDivisionError

        for number in range(20):  # until everything is there that is made once
            await session(number)
        gc.collect()
        before = descriptors(), mappings(), threading.active_count()
        for number in range(SESSIONS):
            await session(number)
        (lease,) = sampler.leases
        await until(lambda: lease.arena.in_use == 0 and not lease._shelves)
        gc.collect()
        assert (descriptors(), mappings(), threading.active_count()) == before
        assert moved(sampler.metrics)["shm received"] > 0
        assert lease.arena._touched < 1 << 20


async def test_leases_taken_and_dropped_leak_no_descriptor_mapping_or_folder(tmp_path: Path) -> None:
    async with steered(listen=f"unix:{tmp_path}/c.sock") as sampler:

        async def drop() -> tuple[int, int]:
            async with visit(sampler):
                pass
            await until(lambda: not sampler.leases)
            return descriptors(), mappings()

        before = await drop()
        assert [await drop() for _ in range(LEASES)] == [before] * LEASES
    assert os.listdir(tmp_path) == []


@asynccontextmanager
async def visit(sampler: Steered) -> AsyncIterator[tuple[transport_service_pb2.OpenLeaseResponse, socket.socket]]:
    """At the side door, by hand: the offer and the connection, admitted."""
    stub = transport_service_pb2_grpc.TransportServiceStub(sampler.peer.channel)
    offer = await stub.OpenLease(transport_service_pb2.OpenLeaseRequest())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(offer.socket)
        connection.send(offer.token)
        _, passed, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 1, 1)
        for descriptor in passed:
            os.close(descriptor)
        yield offer, connection


CLIENT = """
import asyncio, sys
from tests.support.steering import ask, moved, peering, steer

async def main():
    async with peering(sys.argv[1]) as (peer, metrics), steer(peer, "fake", 1.0) as control:
        held = [await ask(control) for _ in range(3)]
        print(moved(metrics)["shm received"], flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_the_memory_of_a_client_that_is_killed_is_reclaimed(nothing_is_left_behind: int) -> None:
    async with steered() as sampler:
        command = [sys.executable, "-c", CLIENT, sampler.server.address]
        client = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE, cwd=ROOT)
        try:
            assert client.stdout is not None
            assert int(await asyncio.to_thread(client.stdout.readline)) > 0
            (lease,) = sampler.leases
            assert lease.arena.in_use > 0
        finally:
            client.send_signal(signal.SIGKILL)
            client.wait()
        await until(lambda: not sampler.leases and mappings() <= nothing_is_left_behind)
        assert (await sampler.residuals(601.0))[0].mid.size  # and others are served


async def test_arrays_of_a_service_that_is_killed_stay_and_its_successor_shares_anew(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/c.sock"
    async with peering(address) as (peer, metrics):
        with start("controlnet", address, FAKE) as service:
            await asyncio.to_thread(service.wait_ready)
            async with steer(peer, "fake", 1.0) as control:
                held = await ask(control)
                copy = held.mid.copy()
                service.process.send_signal(signal.SIGKILL)
                service.process.wait()
                with pytest.raises(Unavailable):
                    await ask(control)
            np.testing.assert_array_equal(held.mid, copy)
        first = moved(metrics)["shm received"]
        with start("controlnet", address, FAKE) as service:
            await asyncio.to_thread(service.wait_ready)
            await peer.channel.channel_ready()
            async with steer(peer, "fake", 1.0) as control:
                await ask(control)
            assert moved(metrics)["shm received"] == 2 * first
            # The folder of the one that was killed is gone too.
            assert len([name for name in os.listdir(tmp_path) if name.startswith("imagemesh-shm-")]) == 1
        del held


class Liar(rpc.ControlNetServiceServicer):
    """A ControlNet that answers what the test tells it to."""

    def __init__(self) -> None:
        self.change: Any = None

    @takes_parcels
    async def Control(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            if request.message.WhichOneof("message") == "step":
                answer = Parcel[pb.ControlResponse]()
                tensors = [answer.add(np.ones((1, 4, 8, 8), np.float32)) for _ in range(2)]
                answer.seal(pb.ControlResponse(down_residuals=tensors[:1], mid_residual=tensors[1]))
                assert await context.call.place(answer)
                self.change(answer.message.mid_residual)
                context.call.place = None
                yield answer.message


@asynccontextmanager
async def lying() -> AsyncIterator[tuple[Liar, Any]]:
    """A server whose answers are tampered with after they were placed, and the sampler's session with it."""
    liar, metrics = Liar(), Metrics("controlnet")
    server = MeshServer(ServerConfig(drain_grace_seconds=0.1), metrics)
    server.add(rpc.add_ControlNetServiceServicer_to_server, liar, "imagemesh.v1.ControlNetService", parcels=True)
    await server.start()
    try:
        async with peering(server.address) as (peer, _):
            yield liar, peer
    finally:
        await server.stop()


LIES = {
    "generation of an earlier message": ("generation", 0, "mid_residual.shared_memory.generation"),
    "generation of a later message": ("generation", 2, "mid_residual.shared_memory.generation"),
    "offset beyond the end": ("offset", 1 << 40, "mid_residual.shared_memory.offset"),
    "offset between elements": ("offset", 1, "mid_residual.shared_memory.offset"),
    "length beyond the end": ("length", (1 << 64) - 1, "mid_residual.shared_memory.length"),
    "length of another shape": ("length", 1020, "mid_residual.data"),
}


@pytest.mark.parametrize(("name", "value", "field"), LIES.values(), ids=LIES)
async def test_a_wrong_reference_in_an_answer_is_refused_by_name(name: str, value: int, field: str) -> None:
    async with lying() as (liar, peer):
        liar.change = lambda tensor: setattr(tensor.shared_memory, name, value)
        async with steer(peer, "fake", 1.0) as control:
            with pytest.raises(InvalidArgument) as caught:
                await ask(control)
        assert caught.value.field == field
        del caught  # and with it the frames that hold the answer
        liar.change = lambda tensor: None
        async with steer(peer, "fake", 1.0) as control:
            assert (await ask(control)).mid.min() == 1


@pytest.mark.parametrize("dtype", ["DTYPE_INT8", "DTYPE_FP16", "DTYPE_UNSPECIFIED"])
async def test_a_wrong_dtype_in_an_answer_is_refused_by_name(dtype: str) -> None:
    async with lying() as (liar, peer):
        liar.change = lambda tensor: setattr(tensor, "dtype", tensor_pb2.Dtype.Value(dtype))
        async with steer(peer, "fake", 1.0) as control:
            with pytest.raises(InvalidArgument, match="mid_residual"):
                await ask(control)


async def test_a_client_that_refers_to_shared_memory_is_refused() -> None:
    """A request can point at nothing: what clients may read is written for them, and they write nothing."""
    async with steered() as sampler, visit(sampler) as (offer, _):
        call = rpc.ControlNetServiceStub(sampler.peer.channel).Control(metadata=((HEADER, f"{offer.token.hex()}-1"),))
        start = pb.ControlStart(units=[pb.ControlNetUnit(model="fake", scale=1.0)])
        start.units[0].image.dtype = 7
        start.units[0].image.shape.extend((8, 8, 3))
        start.units[0].image.shared_memory.length = 192
        await call.write(pb.ControlRequest(start=start))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "start.units[0].image must be carried as data" in await call.details()


@pytest.mark.parametrize(
    "header",
    ["", "-", "0-0", "zz-1", f"{'0' * 32}-1", f"{'0' * 32}-{1 << 64}", f"{'0' * 32}--1"],
    ids=repr,
)
async def test_a_lease_that_nobody_has_is_as_none(header: str) -> None:
    async with steered() as sampler:
        call = rpc.ControlNetServiceStub(sampler.peer.parcels).Control(metadata=((HEADER, header),))
        opening = Parcel[pb.ControlRequest]()
        image, embeddings = np.zeros((8, 8, 3), np.uint8), np.zeros((1, 1, 1), np.float32)
        unit = pb.ControlNetUnit(model="fake", scale=1.0, image=opening.add(image))
        start = pb.ControlStart(units=[unit], encoder_hidden_states=opening.add(embeddings))
        await call.write(opening.seal(pb.ControlRequest(start=start)))
        step = Parcel[pb.ControlRequest]()
        await call.write(step.seal(pb.ControlRequest(step=pb.ControlStep(sample=step.add(SAMPLE), timestep=1.0))))
        answer = await call.read()
        assert answer.array(answer.message.mid_residual, "mid").size
        assert "shm sent" not in moved(sampler.server_metrics)
        call.cancel()


NONSENSE = {
    "a report that is too short": b"x",
    "a report that is too long": b"x" * 1000,
    "messages that were not sent": REPORT.pack(1, 99, -1),
    "nothing but the end": b"",
}


@pytest.mark.parametrize("said", NONSENSE.values(), ids=NONSENSE)
async def test_a_client_that_reports_nonsense_loses_its_lease_alone(said: bytes) -> None:
    async with steered() as sampler, sampler.control(1.0) as other:
        await ask(other)
        async with visit(sampler) as (offer, connection):
            stub = rpc.ControlNetServiceStub(sampler.peer.channel)
            call = stub.Control(metadata=((HEADER, f"{offer.token.hex()}-1"),))
            await call.write(pb.ControlRequest())  # the call has begun, so that its number is known
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
            lease = sampler.server._leases._leases[offer.token]
            lease.enter(1)
            connection.send(said)
            await until(lambda: lease.closed)
            assert await asyncio.to_thread(connection.recv, 1) == b""
        answer = await ask(other)
        assert answer.mid.size
        assert moved(sampler.metrics)["shm received"] >= 2 * answer.mid.nbytes


@pytest.mark.parametrize("word", ["a made-up token", "a token twice", "an empty word"])
async def test_who_was_not_offered_a_lease_gets_none(word: str) -> None:
    async with steered() as sampler, visit(sampler) as (offer, _):
        said = {"a made-up token": b"0" * 16, "a token twice": offer.token, "an empty word": b""}[word]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(offer.socket)
            connection.send(said)
            told, passed, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 1, 1)
            assert (told, passed) == (b"", [])
        assert len(sampler.leases) == 1


async def test_only_its_user_can_come_near_the_side_door(tmp_path: Path) -> None:
    async with steered(listen=f"unix:{tmp_path}/c.sock") as sampler, visit(sampler) as (offer, _):
        folder = os.path.dirname(offer.socket)
        assert os.stat(offer.socket).st_mode & 0o777 == 0o600
        assert os.stat(folder).st_mode & 0o777 == 0o700
        assert os.path.dirname(folder) == str(tmp_path)
    assert os.listdir(tmp_path) == []
