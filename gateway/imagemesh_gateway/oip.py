"""What the gateway serves over the Open Inference Protocol: the stages, forwarded to their services, and the whole."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import numpy as np
from google.protobuf.json_format import MessageToDict

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import text_encoder_service_pb2, vae_service_pb2, vit_service_pb2
from imagemesh_gateway.direct import Direct
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import decode_file
from imagemesh_runtime.oip_messages import one_string, strings
from imagemesh_runtime.oip_models import Arrays, OipModel, Parameters, TensorSpec
from imagemesh_runtime.oip_stages import Name, text_models, vae_models, vit_models
from imagemesh_runtime.replicas import Replicas
from imagemesh_runtime.tensors import Array, from_proto, to_proto

# Inputs of one element: type, and field of the request.
_NUMBERS: Final = {
    "seed": ("INT64", "seed"),
    "steps": ("INT32", "steps"),
    "guidance": ("FP32", "guidance_scale"),
    "width": ("INT32", "width"),
    "height": ("INT32", "height"),
    "num_images": ("INT32", "num_images"),
}
_WORDS: Final = ("negative_prompt", "scheduler", "model")


def oip_models(mesh: Mesh, direct: Direct) -> list[OipModel]:
    """All of them."""

    async def classify(request: vit_service_pb2.ClassifyImagesRequest) -> vit_service_pb2.ClassifyImagesResponse:
        answer: vit_service_pb2.ClassifyImagesResponse = await mesh.vit.unary(mesh.see.ClassifyImages, request)
        return answer

    async def embed(request: vit_service_pb2.EmbedImagesRequest) -> vit_service_pb2.EmbedImagesResponse:
        answer: vit_service_pb2.EmbedImagesResponse = await mesh.vit.unary(mesh.see.EmbedImages, request)
        return answer

    async def encode_text(
        request: text_encoder_service_pb2.EncodeTextRequest,
    ) -> text_encoder_service_pb2.EncodeTextResponse:
        asked = mesh.text_encoder.unary(mesh.encode.EncodeText, request)
        answer: text_encoder_service_pb2.EncodeTextResponse = await asked
        return answer

    async def decode(model: str, latents: Array) -> Array:
        asked = vae_service_pb2.DecodeLatentsRequest(model=model, latents=to_proto(latents))
        return from_proto((await mesh.vae.unary(mesh.decode.DecodeLatents, asked)).images, "images")

    async def encode(model: str, images: Array) -> tuple[Array, Array]:
        asked = vae_service_pb2.EncodeImagesRequest(model=model, images=to_proto(images))
        answer = await mesh.vae.unary(mesh.decode.EncodeImages, asked)
        return from_proto(answer.mean, "mean"), from_proto(answer.log_variance, "log_variance")

    return [
        _generate_model(mesh, direct),
        *text_models(_stage_name(mesh, mesh.text_encoder), encode_text),
        *vae_models(_stage_name(mesh, mesh.vae), decode, encode),
        *vit_models(_name(mesh, mesh.vit), classify, embed),
    ]


def _name(mesh: Mesh, peer: Replicas) -> Name:
    async def name(asked: str) -> str:
        return (await mesh.catalogue.find(peer, asked)).name

    return name


def _stage_name(mesh: Mesh, peer: Replicas) -> Name:
    """Names of a stage's models; "" is the mesh's default model, which the diffusion service tells."""

    async def name(asked: str) -> str:
        wanted = asked or (await mesh.catalogue.find(mesh.diffusion, "")).name
        return (await mesh.catalogue.find(peer, wanted)).name

    return name


def _generate_model(mesh: Mesh, direct: Direct) -> OipModel:
    """``generate``: an answer a step, with ``step`` and ``steps``, and the last with the pictures."""

    async def stream(arrays: Arrays, parameters: Parameters) -> AsyncGenerator[tuple[Arrays, bool], None]:
        steps = 0
        async with aclosing(direct.stream(_request(arrays))) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "progress":
                    steps = event.progress.steps
                    yield {"step": _one(event.progress.step), "steps": _one(steps)}, False
                elif kind == "result":
                    steps = steps or event.result.parameters.steps
                    yield (
                        await asyncio.to_thread(_made, event.result) | {"step": _one(steps), "steps": _one(steps)},
                        True,
                    )

    async def ready() -> bool:
        models, _ = await mesh.models()
        return {"text-encoder", "diffusion", "vae"} <= {model.role for model in models}

    inputs = [TensorSpec("prompt", "BYTES", (1,))]
    inputs += [TensorSpec(name, "BYTES", (1,), optional=True) for name in _WORDS]
    inputs += [TensorSpec(name, kind, (1,), optional=True) for name, (kind, _) in _NUMBERS.items()]
    outputs = [
        TensorSpec("image", "UINT8", (-1, -1, -1, 3)),
        TensorSpec("seed", "INT64", (-1,)),
        TensorSpec("parameters", "BYTES", (1,)),
        TensorSpec("step", "INT32", (1,)),
        TensorSpec("steps", "INT32", (1,)),
    ]
    return OipModel("generate", inputs, outputs, stream=stream, ready=ready)


def _request(arrays: Arrays) -> pb.GenerateRequest:
    fields: dict[str, Any] = {name: one_string(arrays, name) for name in ("prompt", *_WORDS)}
    for name, (kind, field) in _NUMBERS.items():
        if name not in arrays:
            continue
        value = arrays[name].item()
        if not value >= 0:
            raise InvalidArgument(f"inputs[{name!r}]", value, "at least 0")
        fields[field] = value if kind == "FP32" else int(value)
    return pb.GenerateRequest(**fields)


def _made(result: pb.GenerateResult) -> dict[str, Array]:
    told = MessageToDict(result.parameters, preserving_proto_field_name=True)
    return {
        "image": np.stack([decode_file(image.png, "image") for image in result.images]),
        "seed": np.array([image.seed for image in result.images], np.int64),
        "parameters": strings([json.dumps(told)]),
    }


def _one(number: int) -> Array:
    return np.array([number], np.int32)
