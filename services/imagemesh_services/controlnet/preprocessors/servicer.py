"""Requests to arrays and back, for preprocessors."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import cv2
import numpy as np

from imagemesh.v1 import image_pb2
from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh.v1 import preprocess_service_pb2_grpc as rpc
from imagemesh_runtime import preprocessing
from imagemesh_runtime.errors import InvalidArgument, Overloaded
from imagemesh_runtime.images import decode
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, to_proto
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.preprocessors.backend import TASK, Annotator, Task
from imagemesh_services.controlnet.preprocessors.table import PREPROCESSORS, Preprocessor

# What a picture may have when it is worked on: 4096 x 4096, and what OpenCV's maps reach.
MAX_PIXELS: Final = 1 << 24
MAX_SIDE: Final = 16_384
# Of a picture for a model to look at: its image processor enlarges what is small, and may keep the proportions.
MIN_SIDE: Final = preprocessing.MIN_RESOLUTION
MAX_RATIO: Final = 4
_OPENCV: Final = "opencv"


class PreprocessServicer(rpc.PreprocessServiceServicer):
    """Draws on threads of its own; a model, where one is needed, looks at the picture on the lane."""

    def __init__(self, config: ControlNetConfig, models: LoadedModels[Annotator], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._max_queue = config.max_queue
        self._pending = 0
        # A pool, not a semaphore: a caller who leaves frees its thread only when the work has really ended.
        self._pool = ThreadPoolExecutor(config.max_preprocessing, thread_name_prefix="preprocess")

    async def close(self) -> None:
        """Drop what waits; what is under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def ListPreprocessors(
        self, request: pb.ListPreprocessorsRequest, context: Any
    ) -> pb.ListPreprocessorsResponse:
        models = await self._models_by_task()
        infos = [one.to_proto(name, models) for name, one in PREPROCESSORS.items()]
        return pb.ListPreprocessorsResponse(preprocessors=infos)

    async def Preprocess(self, request: pb.PreprocessRequest, context: Any) -> pb.PreprocessResponse:
        known = [one.to_proto(name, {}) for name, one in PREPROCESSORS.items()]
        info = preprocessing.find_preprocessor(known, request.preprocessor)
        values = preprocessing.check_parameters(info, request.parameters, "parameters")
        preprocessing.check_resolution("resolution", request.resolution)
        model = await self._model(info, request.model)
        drawn = await self._draw(PREPROCESSORS[info.name], request, model, values)
        backend = self._models.backend.name if model else _OPENCV
        return pb.PreprocessResponse(image=drawn, preprocessor=info.name, model=model, backend=backend)

    async def _model(self, info: pb.PreprocessorInfo, name: str) -> str:
        task = PREPROCESSORS[info.name].task
        if task is not None:
            info.models.extend((await self._models_by_task()).get(task, []))
        return preprocessing.find_model(info, name, "model")

    async def _models_by_task(self) -> Mapping[Task, list[str]]:
        found: dict[Task, list[str]] = {}
        cards = await asyncio.to_thread(self._models.backend.cards)  # it reads the disk
        for name in sorted(cards):
            found.setdefault(Task(cards[name].properties[TASK]), []).append(name)
        return found

    async def _draw(
        self, preprocessor: Preprocessor, request: pb.PreprocessRequest, model: str, values: Mapping[str, Any]
    ) -> Any:
        """The Tensor that ``preprocessor`` makes of the request's picture."""
        if self._pending >= self._max_queue:
            raise Overloaded("preprocess", self._max_queue, 1.0)
        self._pending += 1
        try:
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(self._pool, prepared, request.image, request.resolution)
            seen: list[Array] = []
            if model:
                _check_for_model(image)
                annotator = await self._models.get(model)
                with self._metrics.stage.time("look"):
                    seen = [await self._models.lane.run(annotator.look, image)]
            with self._metrics.stage.time("preprocess"):
                return await loop.run_in_executor(
                    self._pool, lambda: to_proto(preprocessor.draw(image, *seen, **values))
                )
        finally:
            self._pending -= 1


def _check_for_model(image: Array) -> None:
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_RATIO * min(height, width):
        allowed = f"at least {MIN_SIDE} pixels a side, the longer at most {MAX_RATIO} times the shorter, for a model"
        raise InvalidArgument("image", f"{width}x{height} pixels", allowed)


def prepared(image: image_pb2.Image, resolution: int) -> Array:
    """The picture, its shorter side of ``resolution`` pixels where that isn't 0, to work on.

    Raises:
        InvalidArgument: it is no picture, or too large.
    """
    pixels = decode(image, "image")
    height, width = pixels.shape[:2]
    if resolution:
        scale = resolution / min(height, width)
        height, width = max(round(height * scale), 1), max(round(width * scale), 1)
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        allowed = f"at most {MAX_PIXELS} pixels and {MAX_SIDE} a side, which a resolution can bring it to"
        raise InvalidArgument("resolution" if resolution else "image", f"{width}x{height} pixels", allowed)
    if (height, width) != pixels.shape[:2]:
        smaller = height < pixels.shape[0]
        filter = cv2.INTER_AREA if smaller else cv2.INTER_LANCZOS4
        pixels = cv2.resize(pixels, (width, height), interpolation=filter)
    return np.ascontiguousarray(pixels)
