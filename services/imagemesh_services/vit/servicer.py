"""Requests to arrays and back."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from imagemesh.v1 import image_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.batching import Batcher, submit_rows
from imagemesh_runtime.images import decode
from imagemesh_runtime.limits import MAX_IMAGES, check_range
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.streaming import answers, as_fields
from imagemesh_runtime.tensors import Array
from imagemesh_runtime.throughput import Throughput
from imagemesh_services.vit.answers import classification, embedding_fields
from imagemesh_services.vit.backend import Embedding, VitModel, Wanted
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.wishes import NUMBERS, wanted_of


@dataclass(frozen=True)
class _Key:
    """What pictures must agree in to share a forward; ``wanted`` is None where they are classified.

    The model itself, not its name, which may be another's by the time of the forward: who waits holds on to the model
    that its pictures were preprocessed for. What was measured under a key that is gone keeps no model in memory.
    """

    model: "weakref.ref[VitModel]"
    shape: tuple[int, ...]
    wanted: Wanted | None = None


class VitServicer(rpc.VitServiceServicer):
    """Classifies and embeds; pictures of one model and verb share a forward, whoever they come from."""

    def __init__(self, config: VitConfig, models: LoadedModels[VitModel], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._max_message_bytes = config.max_message_bytes
        self.batcher: Batcher[Array, Any] = Batcher(
            self._compute,
            metrics,
            max_rows=config.max_batch,
            max_queue=config.max_queue,
            throughput=Throughput(),
        )
        # A pool, not a semaphore: a caller who leaves frees its thread only when the decoding has really ended.
        self._decoders = ThreadPoolExecutor(config.max_decoding, thread_name_prefix="decode")

    async def close(self) -> None:
        """Stop; whoever still waits gets Unavailable."""
        await self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def ClassifyImages(self, request: pb.ClassifyImagesRequest, context: Any) -> pb.ClassifyImagesResponse:
        check_range("images", len(request.images), 1, MAX_IMAGES)
        check_range("threshold", request.threshold, 0, 1)
        model = await self._models.get(request.model)
        engine = self._models.engine_of(request.model)
        pixels = await self._pixels(model, request.images, model.sizes.check(request.size))
        logits = np.concatenate(await submit_rows(self.batcher, _Key(weakref.ref(model), pixels.shape[1:]), pixels))
        return pb.ClassifyImagesResponse(
            classifications=[classification(row, model.labels, request) for row in logits],
            model=request.model,
            backend=engine.name,
        )

    async def EmbedImages(self, request: pb.EmbedImagesRequest, context: Any) -> pb.EmbedImagesResponse:
        check_range("images", len(request.images), 1, MAX_IMAGES)
        model = await self._models.get(request.model)
        engine = self._models.engine_of(request.model)
        size = model.sizes.check(request.size)
        wanted = wanted_of(request, model, self._max_message_bytes)
        pixels = await self._pixels(model, request.images, size)
        key = _Key(weakref.ref(model), pixels.shape[1:], wanted)
        embedding = _joined(await submit_rows(self.batcher, key, pixels))
        # Beside the event loop: hidden states are megabytes, and pictures of the attention take their time.
        fields = await asyncio.to_thread(embedding_fields, request, embedding, pixels.shape[2])
        return pb.EmbedImagesResponse(model=request.model, backend=engine.name, **fields)

    async def ClassifyImageStream(
        self, request_iterator: AsyncIterator[pb.ClassifyImageStreamRequest], context: Any
    ) -> AsyncIterator[pb.ClassifyImageStreamResponse]:
        asked = (message.request async for message in request_iterator)
        async with aclosing(answers(asked, lambda one: self.ClassifyImages(one, context))) as outcomes:
            async for index, outcome in outcomes:
                yield pb.ClassifyImageStreamResponse(index=index, **as_fields(outcome))

    async def EmbedImageStream(
        self, request_iterator: AsyncIterator[pb.EmbedImageStreamRequest], context: Any
    ) -> AsyncIterator[pb.EmbedImageStreamResponse]:
        asked = (message.request async for message in request_iterator)
        async with aclosing(answers(asked, lambda one: self.EmbedImages(one, context))) as outcomes:
            async for index, outcome in outcomes:
                yield pb.EmbedImageStreamResponse(index=index, **as_fields(outcome))

    async def DescribeClassifier(
        self, request: pb.DescribeClassifierRequest, context: Any
    ) -> pb.DescribeClassifierResponse:
        model = await self._models.get(request.model)
        return pb.DescribeClassifierResponse(labels=model.labels, poolings=[NUMBERS[one] for one in model.poolings])

    async def _pixels(self, model: VitModel, images: Sequence[image_pb2.Image], size: int) -> Array:
        """float32 [images, 3, h, w]: decoded and preprocessed beside the lane, which has forwards to do."""
        with self.batcher.reserve():
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._decoders, self._preprocessed, model, images, size)

    def _preprocessed(self, model: VitModel, images: Sequence[image_pb2.Image], size: int) -> Array:
        # One after another, so that a request has only one picture at a time in memory at its full size.
        with self._metrics.stage.time("preprocess"):
            return np.stack([model.preprocess(decode(image, f"images[{i}]"), size) for i, image in enumerate(images)])

    async def _compute(self, key: Hashable, items: Sequence[Array]) -> list[Array] | list[Embedding]:
        asked = cast(_Key, key)
        model = asked.model()
        assert model is not None  # a request whose caller left is in no batch
        pixels = np.concatenate(items)
        cuts = np.cumsum([len(item) for item in items])[:-1]
        if asked.wanted is None:
            with self._metrics.stage.time("classify"):
                return np.split(await self._models.lane.run(model.classify, pixels), cuts)
        with self._metrics.stage.time("embed"):
            result = await self._models.lane.run(model.embed, pixels, asked.wanted)
        parts = [[None] * len(items) if array is None else np.split(array, cuts) for array in result]
        return [Embedding(*arrays) for arrays in zip(*parts, strict=True)]


def _joined(parts: Sequence[Embedding]) -> Embedding:
    """The parts of one request, which all have the same arrays."""
    columns: list[list[Array]] = [
        [array for array in column if array is not None] for column in zip(*parts, strict=True)
    ]
    vectors, states, attention = (np.concatenate(column) if column else None for column in columns)
    assert vectors is not None
    return Embedding(vectors, states, attention)
