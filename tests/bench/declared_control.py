"""The ControlNet service as it is, before a network whose time is declared and whose residuals are ready.

A forward sleeps for ``SLOWER`` times what its residuals take on a link of ``LINK``, spread over its blocks as their
arithmetic is.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import numpy as np

from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh.v1 import diffusion_service_pb2
from imagemesh_runtime.client import Peer
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import takes_parcels
from imagemesh_runtime.registry import LoadedModels, ModelCard
from imagemesh_runtime.replicas import Replicas
from imagemesh_runtime.service import ModelServer
from imagemesh_runtime.tensors import Array, to_proto
from imagemesh_services.controlnet.backend import ControlInputs, Emit, Loaded, Part
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.servicer import ControlNetServicer
from imagemesh_services.diffusion.control import Question, Told, open_control
from imagemesh_services.diffusion.controlnets import ControlNets
from tests.bench.owners import LIMIT
from tests.bench.transport import ROWS, SHAPES, residuals

LINK: Final = 1e9 / 8  # bytes a second
SLOWER: Final = 1.5  # a ControlNet's forward, in times of what its residuals take on the wire
AFTERWARDS, BY_BLOCK, AT_ONCE = WAYS = ("after the forward", "block by block", "at once")
# Each block's residuals, and its share of the forward's floating-point operations (torch's count of diffusers'
# ControlNetModel, the hint embedding apart); what comes before the down blocks, the middle block at the end.
PARTS: Final = {
    "SD1.5 512x512": [(1, 0.0), (3, 0.42), (3, 0.26), (3, 0.24), (2, 0.03), (1, 0.05)],
    "SDXL 1024x1024": [(1, 0.0), (3, 0.04), (3, 0.19), (2, 0.5), (1, 0.27)],
}
PATIENCE: Final = 60.0  # seconds for a step: far more than it takes


def wire_seconds(name: str, last: int = 0) -> float:
    """What the link takes for a step's residuals."""
    return sum(ROWS * channels * side * side * 2 for channels, side in SHAPES[name][-last:]) / LINK


class Declared:
    """A ControlNet that takes its time, if it is to, and has its residuals ready; its own run."""

    prompt_rows_only, control_types = False, 0

    def __init__(self, name: str, way: str, last: int) -> None:
        ready = residuals(SHAPES[name])
        small = [one if i >= len(ready) - last or not last else one[:, :1, :1, :1] for i, one in enumerate(ready)]
        self.count, self._afterwards = len(ready), way == AFTERWARDS
        self._seconds = 0.0 if way == AT_ONCE else SLOWER * wire_seconds(name, last)
        self._parts = []
        for many, share in PARTS[name]:
            down, small = small[:many], small[many:]
            self._parts.append((share, Part(down) if small else Part([], down[0])))

    def start(self, inputs: ControlInputs) -> "Declared":
        return self

    def trial(self, image: Array) -> tuple[ControlInputs, Array]:
        sample = np.zeros((ROWS, 4, *(side // 8 for side in image.shape[:2])), np.float16)
        return ControlInputs(image, np.zeros((ROWS, 77, 768), np.float16), 1.0), sample

    def plus(self, one: Array, other: Array) -> Array:
        from imagemesh_services.torch_support import plus

        return plus(one, other)

    def tell(self, embeddings: Array, added: Mapping[str, Array]) -> None:
        """The prompts are nothing to it."""

    def residuals(self, sample: Array, timestep: float, emit: Emit) -> None:
        held = []
        for share, part in self._parts:
            time.sleep(share * self._seconds)
            held.append(part)
            if not self._afterwards:
                emit(held.pop())
        for part in held:
            emit(part)


class DeclaredBackend:
    """Its models' names: the set's, the way, and how many of the residuals are whole."""

    name, device, dtype = "declared", "none", "float16"
    repository = None

    def cards(self) -> Mapping[str, ModelCard]:
        names = [f"{name}/{way}/{last}" for name in SHAPES for way in WAYS for last in (0, 3)]
        return {name: ModelCard(name) for name in names}

    def load(self, name: str) -> Declared:
        shapes, way, last = name.split("/")
        return Declared(shapes, way, int(last))


class Paced(ControlNetServicer):
    """Each message is sent when a link would be done with it: begun when it is there, and those before it are through.

    The machine's own handing over of one message goes on beside the link's time for the next, as it would there.
    """

    @takes_parcels
    async def Control(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        answers: asyncio.Queue[tuple[float, Any] | None] = asyncio.Queue()

        async def produce() -> None:
            try:
                async for answer in ControlNetServicer.Control(self, request_iterator, context):
                    answers.put_nowait((time.perf_counter(), answer))
            finally:
                answers.put_nowait(None)

        producing, free = asyncio.create_task(produce()), 0.0
        try:
            while (one := await answers.get()) is not None:
                there, answer = one
                free = max(free, there) + answer.payload_bytes / LINK
                await asyncio.sleep(free - time.perf_counter())
                yield answer
            await producing
        finally:
            producing.cancel()


async def serve(address: str, servicer: type[ControlNetServicer]) -> None:
    """The process of the ControlNet service."""
    config = ControlNetConfig(listen=address, max_message_bytes=LIMIT, drain_grace_seconds=1.0)
    metrics, lane = Metrics("controlnet"), Lane("c")
    models: LoadedModels[Loaded] = LoadedModels(DeclaredBackend(), lane, metrics)
    server = ModelServer(config, metrics, models)
    added = servicer(config, models, metrics)
    server.add(rpc.add_ControlNetServiceServicer_to_server, added, "imagemesh.v1.ControlNetService", parcels=True)
    await server.start()
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
    lane.close()


class Sampler:
    """What the sampler asks of a set's ControlNets in every step, with guidance."""

    def __init__(self, address: str, name: str, last: int, metrics: Metrics) -> None:
        self.peer = Peer("controlnet", address, max_message_bytes=LIMIT, metrics=metrics, shares_memory=False)
        self._name, self._last = name, last
        side = SHAPES[name][0][1]
        self._told = Told(0, np.zeros((ROWS, 77, 768), np.float16), {})
        self._sample = np.zeros((ROWS, 4, side, side), np.float16)
        self._picture = to_proto(np.zeros((8 * side, 8 * side, 3), np.uint8))

    def open(self, way: str, count: int = 1) -> Any:
        """A session with so many ControlNets."""
        model = f"{self._name}/{way}/{self._last}"
        units = [diffusion_service_pb2.ControlUnit(model=model, image=self._picture, scale=1.0)] * count
        return open_control(ControlNets(Replicas([self.peer], 5)), units, self._told, 1, PATIENCE)

    def question(self, count: int = 1) -> Question:
        return Question(self._sample, 601.0, self._told, list(range(count)))
