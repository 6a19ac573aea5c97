"""Requests to arrays and back."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import numpy as np

from imagemesh.v1 import vae_service_pb2 as pb
from imagemesh.v1 import vae_service_pb2_grpc as rpc
from imagemesh_runtime.batching import Batcher, submit_rows
from imagemesh_runtime.limits import MAX_IMAGES, check_pixels, check_range, check_size
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel, takes_parcels
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import FLOATS, Array, from_proto, require_finite, to_proto
from imagemesh_services.vae.backend import MemoryOptions, VaeModel
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vae.preview import PreviewMap, fit

Results = list[Array] | list[tuple[Array, Array]]


class VaeServicer(rpc.VaeServiceServicer):
    """Decodes and encodes; pictures of one model, size and options share a forward."""

    def __init__(self, config: VaeConfig, models: LoadedModels[VaeModel], metrics: Metrics) -> None:
        self._always = MemoryOptions(config.tiled, config.sliced)
        self._models = models
        self._metrics = metrics
        self._previews: dict[str, PreviewMap] = {}
        self._fitting = asyncio.Lock()
        self.batcher: Batcher[Array, Any] = Batcher(
            self._compute, metrics, max_rows=config.max_batch, max_queue=config.max_queue
        )

    async def DecodeLatents(  # type: ignore[override]
        self, request: pb.DecodeLatentsRequest, context: Any
    ) -> Parcel[pb.DecodeLatentsResponse]:
        model = await self._models.get(request.model)
        shape = (None, model.channels, None, None)
        latents = require_finite(from_proto(request.latents, "latents", dtypes=FLOATS, shape=shape), "latents")
        check_range("latents.shape[0]", latents.shape[0], 1, MAX_IMAGES)
        for axis in (2, 3):
            check_size(f"latents.shape[{axis}] in pixels", latents.shape[axis] * model.scale_factor, model.scale_factor)
        height, width = (side * model.scale_factor for side in latents.shape[2:])
        check_pixels("latents", latents.shape[0], width, height)
        images = np.concatenate(await self._submit("decode", request.model, latents, request.memory))
        answer = Parcel[pb.DecodeLatentsResponse]()
        backend = self._models.engine_of(request.model).name
        return answer.seal(pb.DecodeLatentsResponse(images=answer.add(images), backend=backend))

    @takes_parcels
    async def EncodeImages(  # type: ignore[override]
        self, parcel: Parcel[pb.EncodeImagesRequest], context: Any
    ) -> pb.EncodeImagesResponse:
        request = parcel.message
        model = await self._models.get(request.model)
        images = parcel.array(request.images, "images", dtypes=["uint8", "float32"], shape=(None, None, None, 3))
        if images.dtype != np.uint8 and images.size:
            require_finite(images, "images")
            check_range("the largest magnitude in images", float(np.abs(images).max()), 0, 1)
        check_range("images.shape[0]", images.shape[0], 1, MAX_IMAGES)
        for axis in (1, 2):
            check_size(f"images.shape[{axis}]", images.shape[axis], model.scale_factor)
        check_pixels("images", images.shape[0], images.shape[2], images.shape[1])
        parts = await self._submit("encode", request.model, images, request.memory)
        mean, log_variance = (np.concatenate(part) for part in zip(*parts, strict=True))
        return pb.EncodeImagesResponse(
            mean=to_proto(mean),
            log_variance=to_proto(log_variance),
            scaling_factor=model.scaling_factor,
            shift_factor=model.shift_factor,
            backend=self._models.engine_of(request.model).name,
        )

    async def decode(self, model: str, latents: Array) -> Array:
        """``DecodeLatents`` for a face that has arrays."""
        request = pb.DecodeLatentsRequest(model=model, latents=to_proto(latents))
        answer = await self.DecodeLatents(request, None)
        return answer.payloads[0].reshape(answer.message.images.shape)

    async def encode(self, model: str, images: Array) -> tuple[Array, Array]:
        """``EncodeImages``, likewise: mean and log-variance."""
        request = Parcel(pb.EncodeImagesRequest(model=model, images=to_proto(images)))
        answer = await self.EncodeImages(request, None)
        return from_proto(answer.mean, "mean"), from_proto(answer.log_variance, "log_variance")

    async def FitPreview(self, request: pb.FitPreviewRequest, context: Any) -> pb.FitPreviewResponse:
        model = await self._models.get(request.model)
        async with self._fitting:
            if request.model not in self._previews:
                with self._metrics.stage.time("fit-preview"):
                    self._previews[request.model] = await self._models.lane.run(fit, model)
        found = self._previews[request.model]
        return pb.FitPreviewResponse(
            factors=to_proto(found.factors), bias=to_proto(found.bias), r_squared=found.r_squared
        )

    async def _submit(self, verb: str, model: str, rows: Array, memory: pb.VaeMemoryOptions) -> list[Any]:
        options = MemoryOptions(memory.tiled or self._always.tiled, memory.sliced or self._always.sliced)
        return await submit_rows(self.batcher, (verb, model, rows.shape[1:], rows.dtype.name, options), rows)

    async def _compute(self, key: Hashable, items: Sequence[Array]) -> Results:
        verb, name, _, _, options = cast(tuple[str, str, Any, str, MemoryOptions], key)
        model = await self._models.get(name)
        work: Callable[[Array, MemoryOptions], Any] = model.decode if verb == "decode" else model.encode
        with self._metrics.stage.time(verb):
            result = await self._models.lane.run(work, np.concatenate(items), options)
        cuts = np.cumsum([len(item) for item in items])[:-1]
        if verb == "decode":
            return np.split(result, cuts)
        return list(zip(*(np.split(part, cuts) for part in result), strict=True))
