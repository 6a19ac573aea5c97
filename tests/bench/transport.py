"""What it takes to hand a ControlNet's residuals over, by each of the ways that the runtime has.

Two processes: this one asks, the other owns the residuals and answers. Each arm hands over the full set of one step,
fp16, with guidance: from arrays there to arrays here. Nothing is computed.
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh_runtime.client import Peer
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel
from imagemesh_runtime.server import MeshServer
from imagemesh_runtime.tensors import Array, from_proto, to_proto
from tests.bench.harness import Figure, interleave, ratios
from tests.bench.owners import LIMIT, owner

# (channels, side) of every residual, the middle block's last.
SHAPES = {
    "SD1.5 512x512": [
        *[(320, 64)] * 3, (320, 32), *[(640, 32)] * 2, (640, 16), *[(1280, 16)] * 2, *[(1280, 8)] * 3, (1280, 8)
    ],
    "SDXL 1024x1024": [*[(320, 128)] * 3, (320, 64), *[(640, 64)] * 2, (640, 32), *[(1280, 32)] * 2, (1280, 32)],
}  # fmt: skip
TARGETS = {  # unary over shared memory, shared memory over memcpy, unary over raw blocks
    "SD1.5 512x512": (">= 6", "<= 2.5", ">= 1.6"),
    "SDXL 1024x1024": (">= 15", "<= 2.5", ">= 4"),
}
ROWS = 2


def residuals(shapes: list[tuple[int, int]]) -> list[Array]:
    """The set, filled: pages that nobody has written are copied faster."""
    numbers = np.random.default_rng(0)
    return [numbers.random((ROWS, channels, side, side), np.float32).astype(np.float16) for channels, side in shapes]


class Owner(rpc.ControlNetServiceServicer):
    """Answers every step with the set that the start named as its model, in the way that the timestep says."""

    ONE, BLOCKS, PLAIN = 0.0, 1.0, 2.0

    async def Control(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        arrays: list[Array] = []
        async for request in request_iterator:
            if request.WhichOneof("message") == "start":
                name, last = request.start.units[0].model.split("/")
                arrays = residuals(SHAPES[name][-int(last) :])
            elif request.step.timestep == self.PLAIN:
                down = [to_proto(one) for one in arrays[:-1]]
                yield pb.ControlResponse(down_residuals=down, mid_residual=to_proto(arrays[-1]))
            elif request.step.timestep == self.ONE:
                yield together(arrays)
            else:
                for one in arrays:
                    yield together([one])


def together(arrays: list[Array]) -> Parcel[pb.ControlResponse]:
    """One answer with these, the last as the middle block's."""
    parcel = Parcel[pb.ControlResponse]()
    *down, mid = [parcel.add(one) for one in arrays]
    return parcel.seal(pb.ControlResponse(down_residuals=down, mid_residual=mid))


async def serve(address: str) -> None:
    """The process that owns the residuals."""
    server = MeshServer(ServerConfig(listen=address, max_message_bytes=LIMIT), Metrics("controlnet"))
    server.add(rpc.add_ControlNetServiceServicer_to_server, Owner(), "imagemesh.v1.ControlNetService", parcels=True)
    await server.start()
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


# How the owner answers, and whether memory is shared for it; the counter that proves it.
WAYS = {
    "protobuf": (Owner.PLAIN, False, "protobuf"),
    "raw": (Owner.ONE, False, "raw"),
    "raw blocks": (Owner.BLOCKS, False, "raw"),
    "shared memory": (Owner.ONE, True, "shm"),
}
# For one hand-over: far more than a busy machine takes.
PATIENCE = 60.0


class Asker:
    """One way to be handed the set, in a session of its own."""

    def __init__(self, address: str, way: str, arrays: list[Array]) -> None:
        self._answer, shares, self._path = WAYS[way]
        self._arrays = arrays
        self._metrics = Metrics("bench")
        self._peer = Peer("owner", address, max_message_bytes=LIMIT, metrics=self._metrics, shares_memory=shares)
        stub = rpc.ControlNetServiceStub(self._peer.channel if way == "protobuf" else self._peer.parcels)
        self._session: Any = self._peer.session(stub.Control)

    async def open(self, model: str) -> None:
        await self._session.__aenter__()
        await self._session.send(pb.ControlRequest(start=pb.ControlStart(units=[pb.ControlNetUnit(model=model)])))

    async def hand_over(self) -> None:
        """Every array is there when this returns.

        It answers nothing: ``asyncio.Runner`` has its task shown as text, result and all, which of these takes longer
        than all the rest.
        """
        await self._ask()

    async def _ask(self) -> list[Array]:
        async with asyncio.timeout(PATIENCE):
            answers = [await self._session.ask(pb.ControlRequest(step=pb.ControlStep(timestep=self._answer)))]
            if self._answer == Owner.BLOCKS:
                answers += [await self._session.hear() for _ in self._arrays[1:]]
        return [array for answer in answers for array in _arrays(answer)]

    async def prove(self) -> None:
        """The arrays are the owner's, and came the way they should.

        Raises:
            RuntimeError: they did not.
        """
        got, labels = await self._ask(), {"service": "bench", "path": self._path, "direction": "received"}
        if not all(map(np.array_equal, got, self._arrays)):
            raise RuntimeError(f"other arrays came by {self._path}")
        carried = self._metrics.registry.get_sample_value("imagemesh_transport_bytes_total", labels)
        if not carried or carried < sum(array.nbytes for array in self._arrays):
            raise RuntimeError(f"not all bytes came by {self._path}")

    async def close(self) -> None:
        await self._session.__aexit__(None, None, None)
        await self._peer.close()


def _arrays(answer: Any) -> list[Array]:
    message = answer.message if isinstance(answer, Parcel) else answer
    read: Callable[[Any, str], Array] = answer.array if isinstance(answer, Parcel) else from_proto
    return [read(one, "residual") for one in (*message.down_residuals, message.mid_residual)]


def measure(rounds: int, last: int = 0) -> list[Figure]:
    """Both sets, all of them, or only their ``last`` tensors."""
    figures: list[Figure] = []
    for listen in ("tcp", "unix"):
        with tempfile.TemporaryDirectory() as folder:
            address = "127.0.0.1:0" if listen == "tcp" else f"unix:{folder}/o.sock"
            with owner(address, "tests.bench.transport") as found:
                for name in SHAPES:
                    figures += _handed_over(found, listen, name, rounds, last)
    return figures


def _handed_over(address: str, listen: str, name: str, rounds: int, last: int) -> list[Figure]:
    arrays = residuals(SHAPES[name][-last:])
    there = [np.zeros_like(array) for array in arrays]

    def memcpy() -> None:
        for array, copy in zip(arrays, there, strict=True):
            np.copyto(copy, array)

    with asyncio.Runner() as runner:
        askers: dict[str, Asker] = {}

        async def begin(way: str) -> None:
            askers[way] = Asker(address, way, arrays)
            await askers[way].open(f"{name}/{last}")
            await askers[way].prove()

        for way in WAYS:
            runner.run(begin(way))
        arms: dict[str, Callable[[], object]] = {
            way: lambda way=way: runner.run(askers[way].hand_over()) for way in WAYS
        }
        seconds = interleave({**arms, "memcpy": memcpy}, rounds)
        for asker in askers.values():
            runner.run(asker.close())
    return _figures(f"{name}, {listen}", seconds, TARGETS[name])


def _figures(what: str, seconds: dict[str, list[float]], targets: tuple[str, str, str]) -> list[Figure]:
    figures = [
        Figure.of(f"residuals, {what}: {way}", [one * 1e3 for one in taken], "ms") for way, taken in seconds.items()
    ]
    compared = (
        ("protobuf", "shared memory", targets[0]),
        ("shared memory", "memcpy", targets[1]),
        ("protobuf", "raw blocks", targets[2]),
        ("protobuf", "raw", ""),
    )
    for over, under, target in compared:
        figures.append(Figure.of(f"residuals, {what}: {over} / {under}", ratios(seconds, over, under), "x", target))
    return figures
