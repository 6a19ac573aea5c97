"""The mesh's stages as models of the Open Inference Protocol, over what answers for a stage: a servicer, a channel."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from imagemesh.v1 import image_pb2, text_encoder_service_pb2, vit_service_pb2
from imagemesh_runtime.errors import FailedPrecondition, MeshError
from imagemesh_runtime.limits import MAX_IMAGES
from imagemesh_runtime.oip_messages import one_string, strings
from imagemesh_runtime.oip_models import Arrays, OipModel, Parameters, TensorSpec
from imagemesh_runtime.tensors import Array, from_proto, to_proto

# The mesh's model of that name, or the default one for "".
Name = Callable[[str], Awaitable[str]]
Classify = Callable[[vit_service_pb2.ClassifyImagesRequest], Awaitable[vit_service_pb2.ClassifyImagesResponse]]
Embed = Callable[[vit_service_pb2.EmbedImagesRequest], Awaitable[vit_service_pb2.EmbedImagesResponse]]
EncodeText = Callable[
    [text_encoder_service_pb2.EncodeTextRequest], Awaitable[text_encoder_service_pb2.EncodeTextResponse]
]
# Latents to pictures, and pictures to mean and log-variance; first the model's name.
Decode = Callable[[str, Array], Awaitable[Array]]
Encode = Callable[[str, Array], Awaitable[tuple[Array, Array]]]

_EVERY_LABEL = 2**31
_PICTURE = TensorSpec("image", "UINT8", (-1, -1, 3))


def vit_models(name: Name, classify: Classify, embed: Embed) -> list[OipModel]:
    """``vit``, whose outputs can be classified, and ``vit_embedding``."""

    async def logits(arrays: Arrays, parameters: Parameters) -> Arrays:
        asked = vit_service_pb2.ClassifyImagesRequest(
            model=await name(_model(parameters)), images=_images(arrays["image"]), top_k=_EVERY_LABEL
        )
        answer = await classify(asked)
        rows = [sorted(one.predictions, key=lambda told: told.index) for one in answer.classifications]
        return {
            "labels": strings([told.label for told in rows[0]]),
            "logits": np.array([[told.logit for told in row] for row in rows], np.float32),
            "probabilities": np.array([[told.probability for told in row] for row in rows], np.float32),
        }

    async def embedding(arrays: Arrays, parameters: Parameters) -> Arrays:
        asked = vit_service_pb2.EmbedImagesRequest(
            model=await name(_model(parameters)),
            images=_images(arrays["image"]),
            normalize=bool(parameters.get("normalize")),
        )
        return {"embedding": from_proto((await embed(asked)).embeddings, "embeddings").astype(np.float32)}

    outputs = [TensorSpec("probabilities", "FP32", (-1,)), TensorSpec("logits", "FP32", (-1,))]
    return [
        OipModel("vit", [_PICTURE], outputs, logits, max_batch=MAX_IMAGES, labels="labels", ready=_ready(name)),
        OipModel(
            "vit_embedding", [_PICTURE], [TensorSpec("embedding", "FP32", (-1,))], embedding,
            max_batch=MAX_IMAGES, ready=_ready(name),
        ),
    ]  # fmt: skip


def vae_models(name: Name, decode: Decode, encode: Encode) -> list[OipModel]:
    """``vae_decoder`` and ``vae_encoder``."""
    latents = (-1, -1, -1)

    async def decoded(arrays: Arrays, parameters: Parameters) -> Arrays:
        return {"image": await decode(await name(_model(parameters)), arrays["latents"])}

    async def encoded(arrays: Arrays, parameters: Parameters) -> Arrays:
        mean, log_variance = await encode(await name(_model(parameters)), arrays["image"])
        return {"mean": mean.astype(np.float32), "log_variance": log_variance.astype(np.float32)}

    posterior = [TensorSpec("mean", "FP32", latents), TensorSpec("log_variance", "FP32", latents)]
    return [
        OipModel(
            "vae_decoder", [TensorSpec("latents", "FP32", latents)], [_PICTURE], decoded,
            max_batch=MAX_IMAGES, ready=_ready(name),
        ),
        OipModel("vae_encoder", [_PICTURE], posterior, encoded, max_batch=MAX_IMAGES, ready=_ready(name)),
    ]  # fmt: skip


def text_models(name: Name, encode: EncodeText) -> list[OipModel]:
    """``text_encoder``: a prompt, and its embeddings by diffusers' names as far as the model has them."""

    async def embedded(arrays: Arrays, parameters: Parameters) -> Arrays:
        asked = text_encoder_service_pb2.EncodeTextRequest(
            model=await name(_model(parameters)),
            prompt=one_string(arrays, "prompt"),
            literal=bool(parameters.get("literal")),
        )
        if "negative_prompt" in arrays:
            asked.negative_prompt = one_string(arrays, "negative_prompt")
        told = (await encode(asked)).conditioning
        return {key: from_proto(told[key], key).astype(np.float32) for key in told}

    outputs = [
        TensorSpec("prompt_embeds", "FP32", (-1, -1, -1)),
        TensorSpec("negative_prompt_embeds", "FP32", (-1, -1, -1)),
        TensorSpec("pooled_prompt_embeds", "FP32", (-1, -1)),
        TensorSpec("negative_pooled_prompt_embeds", "FP32", (-1, -1)),
    ]
    inputs = [TensorSpec("prompt", "BYTES", (1,)), TensorSpec("negative_prompt", "BYTES", (1,), optional=True)]
    return [OipModel("text_encoder", inputs, outputs, embedded, ready=_ready(name))]


def _images(pictures: Array) -> list[image_pb2.Image]:
    return [image_pb2.Image(pixels=to_proto(np.ascontiguousarray(one))) for one in pictures]


def _model(parameters: Parameters) -> str:
    """The parameter ``model``: which of the mesh's models is meant."""
    return str(parameters.get("model", ""))


def _ready(name: Name) -> Callable[[], Awaitable[bool]]:
    async def ready() -> bool:
        try:
            await name("")
        except MeshError:
            return False
        return True

    return ready


def local_name(cards: Callable[[], Any]) -> Name:
    """Names of a service's own models; ``cards`` is the backend's."""

    async def name(asked: str) -> str:
        known = await asyncio.to_thread(cards)  # it reads the disk
        if not asked and not known:
            raise FailedPrecondition("there is no model to serve")
        return asked or min(known)

    return name
