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
from imagemesh_services.text_encoder.backend import Encoded, TextModel, Tokens
from imagemesh_services.text_encoder.config import TextEncoderConfig


class TextEncoderServicer(rpc.TextEncoderServiceServicer):
    """Encodes prompts; windows of one model and clip skip share a forward, whoever they come from."""

    def __init__(self, config: TextEncoderConfig, models: LoadedModels[TextModel], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self.batcher: Batcher[Array, Encoded] = Batcher(
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
        rows = await self._encoded(request, model, _padded([one.windows for one in tokens.values()], model))
        conditioning: dict[str, Array] = {}
        for name, encoded in zip(tokens, rows, strict=True):
            conditioning |= _named(name, encoded, zero=model.zeroes_empty_negative and not prompts[name])
        return pb.EncodeTextResponse(
            conditioning=map_to_proto(conditioning),
            prompt_tokens=tokens["prompt"].count,
            backend=self._models.backend.name,
        )

    async def _encoded(
        self, request: pb.EncodeTextRequest, model: TextModel, windows: Sequence[Array]
    ) -> list[Encoded]:
        """Each prompt's windows, encoded; in one forward where the prompts leave out equally many layers."""
        skips = [request.clip_skip] + [request.clip_skip if model.skips_negative else 0] * (len(windows) - 1)
        if len(set(skips)) > 1:
            pairs = zip(skips, windows, strict=True)
            return list(await asyncio.gather(*(self._rows(request.model, skip, rows) for skip, rows in pairs)))
        joined = await self._rows(request.model, skips[0], np.concatenate(windows))
        return _split(joined, np.cumsum([len(rows) for rows in windows])[:-1])

    async def _rows(self, model: str, clip_skip: int, windows: Array) -> Encoded:
        parts = await submit_rows(self.batcher, (model, clip_skip), windows)
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Encoded(np.concatenate([part.embeds for part in parts]), np.concatenate(pooled) if pooled else None)

    async def _compute(self, key: Hashable, items: Sequence[Array]) -> list[Encoded]:
        name, clip_skip = cast(tuple[str, int], key)
        model = await self._models.get(name)
        with self._metrics.stage.time("encode_text"):
            encoded = await self._models.lane.run(model.encode, np.concatenate(items), clip_skip)
        for found in (encoded.embeds, encoded.pooled):
            if found is not None and not np.isfinite(found.astype(np.float32)).all():
                raise NotFinite(name, "embeddings")
        return _split(encoded, np.cumsum([len(item) for item in items])[:-1])


def _split(encoded: Encoded, cuts: Array) -> list[Encoded]:
    embeds = np.split(encoded.embeds, cuts)
    if encoded.pooled is None:
        return [Encoded(part) for part in embeds]
    return [Encoded(*pair) for pair in zip(embeds, np.split(encoded.pooled, cuts), strict=True)]


def _named(name: str, encoded: Encoded, *, zero: bool) -> dict[str, Array]:
    """One prompt's embeddings by diffusers' names."""
    found = {f"{name}_embeds": encoded.embeds.reshape(1, -1, encoded.embeds.shape[-1])}
    negative = name == "negative_prompt"
    # Of a prompt in several windows the first is the summary.
    if encoded.pooled is not None:
        found["negative_pooled_prompt_embeds" if negative else "pooled_prompt_embeds"] = encoded.pooled[:1]
    return {key: np.zeros_like(array) for key, array in found.items()} if negative and zero else found


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
