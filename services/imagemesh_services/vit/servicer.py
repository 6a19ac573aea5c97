"""Requests to arrays and back."""

import asyncio
import math
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from imagemesh.v1 import image_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.batching import Batcher, submit_rows
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import decode
from imagemesh_runtime.limits import MAX_IMAGES, check_range
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.streaming import answers, as_fields
from imagemesh_runtime.tensors import Array, to_proto
from imagemesh_services.vit.backend import Embedding, Pooling, VitModel
from imagemesh_services.vit.config import VitConfig

DEFAULT_TOP_K: Final = 5
_POOLINGS: Final = {
    pb.POOLING_UNSPECIFIED: Pooling.CLS,
    pb.POOLING_CLS: Pooling.CLS,
    pb.POOLING_MEAN: Pooling.MEAN,
}


@dataclass(frozen=True)
class _Key:
    """What pictures must agree in to share a forward; ``pooling`` is None where they are classified."""

    model: str
    shape: tuple[int, ...]
    pooling: Pooling | None = None
    hidden_states: bool = False


class VitServicer(rpc.VitServiceServicer):
    """Classifies and embeds; pictures of one model and verb share a forward, whoever they come from."""

    def __init__(self, config: VitConfig, models: LoadedModels[VitModel], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._max_message_bytes = config.max_message_bytes
        self.batcher: Batcher[Array, Any] = Batcher(
            self._compute, metrics, max_rows=config.max_batch, max_queue=config.max_queue
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
        pixels = await self._pixels(model, request.images)
        logits = np.concatenate(await submit_rows(self.batcher, _Key(request.model, pixels.shape[1:]), pixels))
        return pb.ClassifyImagesResponse(
            classifications=[_classification(row, model.labels, request) for row in logits],
            model=request.model,
            backend=self._models.backend.name,
        )

    async def EmbedImages(self, request: pb.EmbedImagesRequest, context: Any) -> pb.EmbedImagesResponse:
        check_range("images", len(request.images), 1, MAX_IMAGES)
        if request.pooling not in _POOLINGS:
            raise InvalidArgument("pooling", request.pooling, f"one of {', '.join(pb.Pooling.keys())}")
        model = await self._models.get(request.model)
        if request.hidden_states:
            self._check_hidden_states(model, len(request.images))
        pixels = await self._pixels(model, request.images)
        key = _Key(request.model, pixels.shape[1:], _POOLINGS[request.pooling], request.hidden_states)
        vectors, hidden_states = _joined(await submit_rows(self.batcher, key, pixels))
        return pb.EmbedImagesResponse(
            embeddings=to_proto(_normalized(vectors) if request.normalize else vectors),
            hidden_states=None if hidden_states is None else to_proto(hidden_states.swapaxes(0, 1)),
            model=request.model,
            backend=self._models.backend.name,
        )

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

    async def _pixels(self, model: VitModel, images: Sequence[image_pb2.Image]) -> Array:
        """float32 [images, 3, h, w]: decoded and preprocessed beside the lane, which has forwards to do."""
        with self.batcher.reserve():
            return await asyncio.get_running_loop().run_in_executor(self._decoders, self._preprocessed, model, images)

    def _preprocessed(self, model: VitModel, images: Sequence[image_pb2.Image]) -> Array:
        # One after another, so that a request has only one picture at a time in memory at its full size.
        with self._metrics.stage.time("preprocess"):
            return np.stack([model.preprocess(decode(image, f"images[{i}]")) for i, image in enumerate(images)])

    async def _compute(self, key: Hashable, items: Sequence[Array]) -> list[Array] | list[Embedding]:
        wanted = cast(_Key, key)
        model = await self._models.get(wanted.model)
        pixels = np.concatenate(items)
        cuts = np.cumsum([len(item) for item in items])[:-1]
        if wanted.pooling is None:
            with self._metrics.stage.time("classify"):
                return np.split(await self._models.lane.run(model.classify, pixels), cuts)
        with self._metrics.stage.time("embed"):
            result = await self._models.lane.run(model.embed, pixels, wanted.pooling, wanted.hidden_states)
        vectors = np.split(result.vectors, cuts)
        if result.hidden_states is None:
            return [Embedding(part, None) for part in vectors]
        return [Embedding(*parts) for parts in zip(vectors, np.split(result.hidden_states, cuts), strict=True)]

    def _check_hidden_states(self, model: VitModel, images: int) -> None:
        """Refuse before the work what would not fit into the answer."""
        an_image = math.prod((model.layers + 1, model.tokens, model.width)) * np.dtype(np.float32).itemsize
        most = self._max_message_bytes // an_image
        if images > most:
            raise InvalidArgument("images", images, f"at most {most} where this model's hidden states are asked for")


def _joined(parts: Sequence[Embedding]) -> Embedding:
    vectors = np.concatenate([part.vectors for part in parts])
    states = [part.hidden_states for part in parts if part.hidden_states is not None]
    return Embedding(vectors, np.concatenate(states) if states else None)


def _classification(logits: Array, labels: Sequence[str], request: pb.ClassifyImagesRequest) -> pb.Classification:
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(-logits, kind="stable")[: request.top_k or DEFAULT_TOP_K]
    predictions = [
        pb.Prediction(label=labels[i], probability=probabilities[i], index=i, logit=logits[i])
        for i in best.tolist()
        if probabilities[i] >= request.threshold
    ]
    return pb.Classification(predictions=predictions)


def _normalized(vectors: Array) -> Array:
    lengths: Array = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Array = vectors / np.where(lengths > 0, lengths, 1)
    return unit.astype(vectors.dtype)
