"""A gateway that remembers what it was asked and answers what the tests can work out; real gRPC, on its own thread."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from imagemesh.v1 import diffusion_service_pb2, model_service_pb2, tensor_pb2, vit_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import gateway_service_pb2_grpc as rpc
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.images import decode
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.server import MeshServer
from imagemesh_runtime.streaming import as_fields
from imagemesh_runtime.tensors import to_proto

STEPS = 3


class RecordingGateway(rpc.GatewayServiceServicer):
    """Picture i of a generation is 8 x 8 pixels of (seed + i) % 256; the embedding of picture i, of a
    request or of a stream, is [i, i + 0.5]."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[Any] = []
        # Fail the next calls with this.
        self.error: MeshError | None = None
        # Go no further than the first step.
        self.hold = False
        # End a generation without its result.
        self.forget_result = False
        # Answer no label to what is classified.
        self.labels = True
        # Have a model to list.
        self.has_models = True
        # Calls of ClassifyStream.
        self.streams = 0
        self.holding, self.cancelled = threading.Event(), threading.Event()

    def _note(self, request: Any) -> None:
        self.requests.append(request)
        if self.error is not None:
            raise self.error

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self._note(request)
        yield pb.GenerateResponse(queued=pb.GenerateQueued(id="g1", position=2))
        for step in range(1, STEPS + 1):
            yield pb.GenerateResponse(progress=pb.GenerateProgress(step=step, steps=STEPS))
            if self.hold:
                await self._hold()
        yield pb.GenerateResponse()  # an event of a kind that doesn't exist yet
        if not self.forget_result:
            yield pb.GenerateResponse(result=_result(request))

    async def _hold(self) -> None:
        self.holding.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        self._note(request)
        predictions = [
            vit_service_pb2.Prediction(label="cat", probability=0.75, index=4, logit=2.5),
            vit_service_pb2.Prediction(label="dog", probability=0.25, index=1, logit=1.5),
        ]
        one = vit_service_pb2.Classification(predictions=predictions if self.labels else [])
        return pb.ClassifyResponse(classifications=[one] * len(request.images), model="vit-tiny", backend="fake")

    async def Embed(self, request: pb.EmbedRequest, context: Any, first: int = 0) -> pb.EmbedResponse:
        self._note(request)
        if self.hold:
            await self._hold()
        rows = np.array([[i, i + 0.5] for i in range(first, first + len(request.images))], dtype=np.float32)
        answer = pb.EmbedResponse(embeddings=to_proto(rows), model="vit-tiny", backend="fake")
        if request.dtype == tensor_pb2.DTYPE_INT8:
            answer.embeddings.CopyFrom(to_proto((rows * 2).astype(np.int8)))
            answer.scales.CopyFrom(to_proto(np.full(len(rows), 0.5, np.float32)))
        return answer

    async def ClassifyStream(
        self, request_iterator: AsyncIterator[pb.ClassifyStreamRequest], context: Any
    ) -> AsyncIterator[pb.ClassifyStreamResponse]:
        self.streams += 1
        async for index, request in _numbered(request_iterator):
            try:
                decode(request.request.images[0], "images[0]")
                answer = {"response": await self.Classify(request.request, context)}
            except MeshError as error:
                answer = as_fields(error)
            yield pb.ClassifyStreamResponse(index=index, **answer)

    async def EmbedStream(
        self, request_iterator: AsyncIterator[pb.EmbedStreamRequest], context: Any
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        async for index, request in _numbered(request_iterator):
            yield pb.EmbedStreamResponse(index=index, response=await self.Embed(request.request, context, index))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._note(request)
        info = model_service_pb2.ModelInfo(
            name="sd-tiny", role="diffusion", backend="torch", dtype="float32", device="cpu", loaded=True,
            properties={"width": "64", "scheduler": "DPM++ 2M", "scheduler_class": "DPMSolverMultistepScheduler"},
        )  # fmt: skip
        if not self.has_models:
            return pb.ListModelsResponse(roots=["/models", "/more"])
        return pb.ListModelsResponse(models=[info], unreachable=["vit"], roots=["/models"])

    async def DescribeSampling(self, request: pb.DescribeSamplingRequest, context: Any) -> pb.DescribeSamplingResponse:
        self._note(request)
        scheduler = diffusion_service_pb2.SchedulerInfo(
            name="DPM++ 2M", class_name="DPMSolverMultistepScheduler", options={"solver_order": "2"},
            accepts={"solver_order": "1 to 3"},
        )  # fmt: skip
        guider = diffusion_service_pb2.GuiderInfo(
            name="APG", class_name="Adaptive", about="turns", accepts={"eta": "0 to 1"}
        )
        return pb.DescribeSamplingResponse(schedulers=[scheduler], guiders=[guider])


async def _numbered(requests: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    index = 0
    async for request in requests:
        yield index, request
        index += 1


def _result(request: pb.GenerateRequest) -> pb.GenerateResult:
    first = request.seed if request.HasField("seed") else 41
    seeds = range(first, first + request.num_images)
    parameters = pb.GenerateParameters(
        prompt=request.prompt, model=request.model or "sd-tiny", width=8, height=8, steps=STEPS, guidance_scale=7.5,
        scheduler="DDIM", seed=first, backends={"vae": "fake"},
    )  # fmt: skip
    timing = pb.StageTiming(
        stage="vae", seconds=0.5, compute_seconds=0.25, queue_seconds=0.125, bytes_sent=10, bytes_received=20
    )
    images = [pb.GeneratedImage(png=png(seed % 256), seed=seed) for seed in seeds]
    return pb.GenerateResult(id="g1", images=images, parameters=parameters, timings=[timing])


def png(value: int) -> bytes:
    """A PNG file of 8 x 8 pixels of one grey."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


@contextmanager
def recording_gateway() -> Iterator[RecordingGateway]:
    """The gateway behind the mesh's own server, for as long as the context lasts."""
    gateway = RecordingGateway()
    started: Future[asyncio.AbstractEventLoop] = Future()
    stop = asyncio.Event()

    async def live() -> None:
        server = MeshServer(ServerConfig(drain_grace_seconds=0.0), Metrics("gateway"))
        server.add(rpc.add_GatewayServiceServicer_to_server, gateway, "imagemesh.v1.GatewayService")
        await server.start()
        gateway.address = server.address
        started.set_result(asyncio.get_running_loop())
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(live()), name="recording-gateway")
    thread.start()
    loop = started.result(timeout=30)
    try:
        yield gateway
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
