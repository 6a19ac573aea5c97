"""Requests to arrays and back."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagemesh.v1 import text_encoder_service_pb2 as pb
from imagemesh.v1 import text_encoder_service_pb2_grpc as rpc
from imagemesh_runtime.limits import MAX_STEPS, check_prompt, check_range
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, map_to_proto
from imagemesh_services.text_encoder.attention import is_plain
from imagemesh_services.text_encoder.backend import PromptModel, TextModel
from imagemesh_services.text_encoder.cache import Embedded
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.text_encoder.encoder import Encoder, Want
from imagemesh_services.text_encoder.prompts import Prompt, read_prompt
from imagemesh_services.text_encoder.schedule import Course
from imagemesh_services.text_encoder.whole_prompts import encode_whole


class TextEncoderServicer(rpc.TextEncoderServiceServicer):
    """Encodes prompts."""

    def __init__(
        self, config: TextEncoderConfig, models: LoadedModels[TextModel | PromptModel], metrics: Metrics
    ) -> None:
        self._models = models
        self._encoder = Encoder(config, models, metrics)
        self.batcher = self._encoder.batcher

    async def EncodeText(self, request: pb.EncodeTextRequest, context: Any) -> pb.EncodeTextResponse:
        check_prompt("prompt", request.prompt)
        check_prompt("negative_prompt", request.negative_prompt)
        check_range("steps", request.steps, 0, MAX_STEPS)
        check_range("prior_steps", request.prior_steps, 0, MAX_STEPS)
        model = await self._models.get(request.model)
        check_range("clip_skip", request.clip_skip, 0, model.layers - 1)
        if isinstance(model, PromptModel):
            return await self._whole(request, model)
        as_is = request.literal or not model.widths
        prompts = await asyncio.to_thread(_read, request, as_is=as_is)
        # What each prompt wants, a phase each.
        skips = [request.clip_skip, request.clip_skip if model.skips_negative else 0]
        wants = [
            [Want(text, skip, as_is or is_plain(text)) for text in one.texts]
            for one, skip in zip(prompts, skips, strict=False)
        ]
        fields = {want: one.field for one, own in zip(prompts, wants, strict=True) for want in own}
        found = await self._encoder.encode(request.model, fields)
        conditioning: dict[str, Array] = {}
        for prompt, own in zip(prompts, wants, strict=True):
            conditioning |= _named(prompt, [found[want] for want in own], zeroes=model.zeroes_empty_negative)
        return pb.EncodeTextResponse(
            conditioning=map_to_proto(conditioning),
            prompt_tokens=max(found[want].tokens for want in wants[0]),
            backend=self._models.engine_of(request.model).name,
            scheduled=any(prompt.scheduled for prompt in prompts),
        )

    async def _whole(self, request: pb.EncodeTextRequest, model: PromptModel) -> pb.EncodeTextResponse:
        """Of families that read prompts as they stand: brackets are text to them."""
        conditioning, tokens = await encode_whole(
            self.batcher, request.model, model, _texts(request), request.clip_skip
        )
        backend = self._models.engine_of(request.model).name
        return pb.EncodeTextResponse(conditioning=map_to_proto(conditioning), prompt_tokens=tokens, backend=backend)


def _read(request: pb.EncodeTextRequest, *, as_is: bool) -> list[Prompt]:
    course, texts = Course(request.steps, request.prior_steps), _texts(request)
    return [Prompt(name, [text]) if as_is else read_prompt(name, text, course) for name, text in texts.items()]


def _texts(request: pb.EncodeTextRequest) -> dict[str, str]:
    texts = {"prompt": request.prompt}
    if request.HasField("negative_prompt"):
        texts["negative_prompt"] = request.negative_prompt
    return texts


def _named(prompt: Prompt, phases: Sequence[Embedded], *, zeroes: bool) -> dict[str, Array]:
    """One prompt's embeddings by diffusers' names, a row a phase; of several also which row each step has."""
    embeds = np.stack([one.encoded.embeds.reshape(-1, one.encoded.embeds.shape[-1]) for one in phases])
    found = {f"{prompt.field}_embeds": embeds}
    negative = prompt.field == "negative_prompt"
    # Of a prompt in several windows the first is the summary.
    pooled = [one.encoded.pooled[0] for one in phases if one.encoded.pooled is not None]
    if pooled:
        found["negative_pooled_prompt_embeds" if negative else "pooled_prompt_embeds"] = np.stack(pooled)
    for i, text in enumerate(prompt.texts):
        if negative and zeroes and not text:
            for array in found.values():
                array[i] = 0
    if prompt.rows is not None:
        found[f"{prompt.field}_phases"] = np.array(prompt.rows, dtype=np.int32)
    return found
