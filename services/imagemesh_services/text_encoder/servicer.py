"""Requests to arrays and back."""

from collections.abc import Hashable, Sequence
from typing import Any, cast

import numpy as np

from imagemesh.v1 import text_encoder_service_pb2 as pb
from imagemesh.v1 import text_encoder_service_pb2_grpc as rpc
from imagemesh_runtime.batching import Batcher
from imagemesh_runtime.limits import check_prompt, check_range
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, map_to_proto
from imagemesh_services.text_encoder.backend import TextModel
from imagemesh_services.text_encoder.config import TextEncoderConfig


class TextEncoderServicer(rpc.TextEncoderServiceServicer):
    """Encodes prompts; windows of one model and clip skip share a forward, whoever they come from."""

    def __init__(self, config: TextEncoderConfig, models: LoadedModels[TextModel], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self.batcher: Batcher[Array, Array] = Batcher(
            self._compute, metrics, max_rows=config.max_batch, max_queue=config.max_queue
        )

    async def EncodeText(self, request: pb.EncodeTextRequest, context: Any) -> pb.EncodeTextResponse:
        check_prompt("prompt", request.prompt)
        check_prompt("negative_prompt", request.negative_prompt)
        model = await self._models.get(request.model)
        check_range("clip_skip", request.clip_skip, 0, model.layers - 1)
        prompts = {"prompt_embeds": request.prompt}
        if request.HasField("negative_prompt"):
            prompts["negative_prompt_embeds"] = request.negative_prompt
        windows = _padded({name: model.tokenize(text) for name, text in prompts.items()}, model.tokenize(""))
        tokens = np.concatenate(list(windows.values()))
        embeds = await self.batcher.submit((request.model, request.clip_skip), tokens, len(tokens))
        conditioning = {
            name: part.reshape(1, -1, part.shape[-1])
            for name, part in zip(windows, np.split(embeds, len(windows)), strict=True)
        }
        return pb.EncodeTextResponse(
            conditioning=map_to_proto(conditioning),
            prompt_tokens=model.count_tokens(request.prompt),
            backend=self._models.backend.name,
        )

    async def _compute(self, key: Hashable, items: Sequence[Array]) -> list[Array]:
        name, clip_skip = cast(tuple[str, int], key)
        model = await self._models.get(name)
        with self._metrics.stage.time("encode_text"):
            embeds = await self._models.lane.run(model.encode, np.concatenate(items), clip_skip)
        return np.split(embeds, np.cumsum([len(item) for item in items])[:-1])


def _padded(windows: dict[str, Array], empty: Array) -> dict[str, Array]:
    """Give every prompt as many windows as the longest has, since guidance compares them token by token."""
    most = max(len(part) for part in windows.values())
    return {name: np.concatenate([part, *[empty] * (most - len(part))]) for name, part in windows.items()}
