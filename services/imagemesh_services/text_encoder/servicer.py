"""Requests to arrays and back."""

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from imagemesh.v1 import text_encoder_service_pb2 as pb
from imagemesh.v1 import text_encoder_service_pb2_grpc as rpc
from imagemesh_runtime.batching import Batcher, submit_rows
from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_runtime.limits import MAX_WINDOWS, check_prompt, check_range
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, map_to_proto
from imagemesh_services.text_encoder.backend import TextModel, Tokens
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
        prompts = {"prompt": request.prompt}
        if request.HasField("negative_prompt"):
            prompts["negative_prompt"] = request.negative_prompt
        with self.batcher.reserve():
            tokens = await asyncio.to_thread(_tokenized, model, prompts)
        rows = np.concatenate(_padded([one.windows for one in tokens.values()], model))
        parts = await submit_rows(self.batcher, (request.model, request.clip_skip), rows)
        embeds = np.split(np.concatenate(parts), len(tokens))
        conditioning = {
            f"{name}_embeds": part.reshape(1, -1, part.shape[-1]) for name, part in zip(tokens, embeds, strict=True)
        }
        return pb.EncodeTextResponse(
            conditioning=map_to_proto(conditioning),
            prompt_tokens=tokens["prompt"].count,
            backend=self._models.backend.name,
        )

    async def _compute(self, key: Hashable, items: Sequence[Array]) -> list[Array]:
        name, clip_skip = cast(tuple[str, int], key)
        model = await self._models.get(name)
        with self._metrics.stage.time("encode_text"):
            embeds = await self._models.lane.run(model.encode, np.concatenate(items), clip_skip)
        if not np.isfinite(embeds.astype(np.float32)).all():
            raise NotFinite(name, "embeddings")
        return np.split(embeds, np.cumsum([len(item) for item in items])[:-1])


def _tokenized(model: TextModel, prompts: Mapping[str, str]) -> dict[str, Tokens]:
    return {name: _bounded(name, model.tokenize(text)) for name, text in prompts.items()}


def _bounded(field: str, tokens: Tokens) -> Tokens:
    windows, width = tokens.windows.shape
    if windows > MAX_WINDOWS:
        most = MAX_WINDOWS * (width - 2)  # every window has a start and an end of its own
        raise InvalidArgument(field, f"{tokens.count} tokens", f"at most {most} tokens ({MAX_WINDOWS} windows)")
    return tokens


def _padded(prompts: Sequence[Array], model: TextModel) -> list[Array]:
    """Give every prompt as many windows as the longest has, since guidance compares them token by token."""
    most = max(len(windows) for windows in prompts)
    if all(len(windows) == most for windows in prompts):
        return list(prompts)
    empty = model.tokenize("").windows
    return [np.concatenate([windows, *[empty] * (most - len(windows))]) for windows in prompts]
