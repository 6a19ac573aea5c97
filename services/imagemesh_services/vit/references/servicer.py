"""Requests to arrays and back, for reference pictures."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from imagemesh.v1 import image_pb2
from imagemesh.v1 import reference_service_pb2 as pb
from imagemesh.v1 import reference_service_pb2_grpc as rpc
from imagemesh_runtime.errors import NotFound, Overloaded
from imagemesh_runtime.images import decode
from imagemesh_runtime.limits import MAX_REFERENCES, check_proportion, check_range
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, map_to_proto
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.references.backend import ReferenceEncoder


class ReferenceServicer(rpc.ReferenceServiceServicer):
    """Decodes on threads of its own, and embeds on the lane."""

    def __init__(self, config: VitConfig, models: LoadedModels[ReferenceEncoder], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._max_queue = config.max_queue
        self._pending = 0
        self._pool = ThreadPoolExecutor(config.max_decoding, thread_name_prefix="reference")

    async def close(self) -> None:
        """Drop what waits; what is under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=await self._adapters())

    async def EmbedReferences(self, request: pb.EmbedReferencesRequest, context: Any) -> pb.EmbedReferencesResponse:
        check_range("images", len(request.images), 1, MAX_REFERENCES)
        if self._pending >= self._max_queue:
            raise Overloaded(self._metrics.service, self._max_queue, 1.0)
        self._pending += 1
        try:
            name = request.adapter or await self._first()
            encoder = await self._models.get(name)
            loop = asyncio.get_running_loop()
            pixels = await loop.run_in_executor(self._pool, _preprocessed, encoder, request.images)
            with self._metrics.stage.time("reference"):
                found = await self._models.lane.run(encoder.embed, pixels)
        except NotFound as error:
            raise NotFound("IP-Adapter", request.adapter, await self._adapters()) from error
        finally:
            self._pending -= 1
        embeds = {"image_embeds": found.positive, "negative_image_embeds": found.negative}
        return pb.EmbedReferencesResponse(embeds=map_to_proto(embeds), adapter=name, backend=self._models.backend.name)

    async def _adapters(self) -> list[str]:
        return sorted(await asyncio.to_thread(self._models.backend.cards))  # it reads the disk

    async def _first(self) -> str:
        names = await self._adapters()
        if not names:
            raise NotFound("IP-Adapter", "any", names)
        return names[0]


def _preprocessed(encoder: ReferenceEncoder, images: Sequence[image_pb2.Image]) -> Array:
    found = []
    for i, image in enumerate(images):
        picture = decode(image, f"images[{i}]")
        check_proportion(f"images[{i}]", *picture.shape[:2])
        found.append(encoder.preprocess(picture))
    return np.stack(found)
