"""How a picture is made: encode the text, encode the picture, prepare the control pictures, denoise, decode, pack."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np

from imagemesh.v1 import diffusion_service_pb2, tensor_pb2, text_encoder_service_pb2, vae_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.pictures import Sources, control_picture, describe, encode_png, lay_over, sources
from imagemesh_gateway.placement import sample
from imagemesh_gateway.plan import Plan
from imagemesh_gateway.previews import Previews
from imagemesh_runtime.client import Hop
from imagemesh_runtime.errors import Unavailable
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array, from_proto, to_proto

SampleResult = diffusion_service_pb2.SampleResult
Tensors = dict[str, tensor_pb2.Tensor]


@dataclass
class Ledger:
    """What ran each stage, and what each hop cost."""

    metrics: Metrics
    hops: dict[str, Hop] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)

    def hop(self, stage: str) -> Hop:
        """A new entry."""
        self.hops[stage] = Hop()
        return self.hops[stage]

    def timings(self) -> list[pb.StageTiming]:
        """The entries, in the order of the stages."""
        return [
            pb.StageTiming(
                stage=stage,
                seconds=hop.seconds,
                compute_seconds=hop.compute_seconds,
                queue_seconds=hop.queue_seconds,
                bytes_sent=hop.bytes_sent,
                bytes_received=hop.bytes_received,
            )
            for stage, hop in self.hops.items()
        ]


async def generate(mesh: Mesh, plan: Plan, metrics: Metrics) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Run the request graph for one generation; the last event is the result.

    Raises:
        MeshError: a stage failed; the error names the service or the field.
    """
    ledger = Ledger(metrics)
    conditioning = await _encode_text(mesh, plan, ledger)
    source = await _prepare_source(plan, metrics)
    inputs = await _encode_image(mesh, plan, source, ledger)
    controls = await _prepare_controls(plan, metrics)
    sampled: SampleResult | None = None
    async with aclosing(_denoise(mesh, plan, conditioning, inputs, controls, ledger)) as events:
        async for event in events:
            if isinstance(event, pb.GenerateResponse):
                yield event
            else:
                sampled = event
    if sampled is None:
        raise Unavailable("diffusion", "the stream ended without a result")
    images = await _decode(mesh, plan, sampled, ledger)
    if source is not None:
        images = np.stack([await asyncio.to_thread(lay_over, image, source) for image in images])
    yield pb.GenerateResponse(result=await _pack(plan, sampled, images, ledger))


async def _encode_text(mesh: Mesh, plan: Plan, ledger: Ledger) -> Tensors:
    request = text_encoder_service_pb2.EncodeTextRequest(model=plan.model, prompt=plan.prompt, clip_skip=plan.clip_skip)
    if plan.guided:
        request.negative_prompt = plan.negative_prompt
    with ledger.metrics.stage.time("text-encoder"):
        answer = await mesh.text_encoder.unary(mesh.encode.EncodeText, request, ledger.hop("text-encoder"))
    ledger.backends["text-encoder"] = answer.backend
    return dict(answer.conditioning)


async def _prepare_source(plan: Plan, metrics: Metrics) -> Sources | None:
    if plan.image is None:
        return None
    with metrics.stage.time("source-pictures"):
        return await asyncio.to_thread(sources, plan, plan.image)


async def _encode_image(mesh: Mesh, plan: Plan, source: Sources | None, ledger: Ledger) -> Tensors:
    if source is None:
        return {}
    request = vae_service_pb2.EncodeImagesRequest(model=plan.model, images=to_proto(source.image[None]))
    with ledger.metrics.stage.time("vae-encode"):
        answer = await mesh.vae.unary(mesh.decode.EncodeImages, request, ledger.hop("vae-encode"))
    ledger.backends["vae-encode"] = answer.backend
    inputs = {"image_mean": answer.mean, "image_log_variance": answer.log_variance}
    if source.mask is not None:
        inputs["mask"] = to_proto(source.mask[None, None])
    return inputs


async def _prepare_controls(plan: Plan, metrics: Metrics) -> list[diffusion_service_pb2.ControlUnit]:
    if not plan.controls:
        return []
    with metrics.stage.time("control-pictures"):
        pictures = [await asyncio.to_thread(control_picture, plan, i) for i in range(len(plan.controls))]
    return [
        diffusion_service_pb2.ControlUnit(model=unit.model, image=to_proto(picture), scale=unit.scale)
        for unit, picture in zip(plan.controls, pictures, strict=True)
    ]


def _sample_request(
    plan: Plan, conditioning: Tensors, inputs: Tensors, controls: list[diffusion_service_pb2.ControlUnit]
) -> diffusion_service_pb2.SampleRequest:
    return diffusion_service_pb2.SampleRequest(
        model=plan.model,
        conditioning=conditioning,
        width=plan.width,
        height=plan.height,
        steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        scheduler=plan.scheduler,
        seeds=plan.seeds,
        controls=controls,
        inputs=inputs,
        strength=plan.image.strength if plan.image else 0,
        priority=plan.priority,
        variation_seeds=plan.variation_seeds,
        variation_strength=plan.variation_strength,
        scheduler_options=plan.scheduler_options,
        preview_every=plan.preview_every,
    )


async def _denoise(
    mesh: Mesh,
    plan: Plan,
    conditioning: Tensors,
    inputs: Tensors,
    controls: list[diffusion_service_pb2.ControlUnit],
    ledger: Ledger,
) -> AsyncGenerator[pb.GenerateResponse | SampleResult, None]:
    request = _sample_request(plan, conditioning, inputs, controls)
    previews = await Previews.of(mesh, plan.model) if plan.preview_every else None
    with ledger.metrics.stage.time("diffusion"):
        stream = sample(mesh.diffusion, request, ledger.hop("diffusion"), ledger.metrics, mesh.checkpoint_every)
        async with aclosing(stream) as responses:
            async for response in responses:
                kind = response.WhichOneof("event")
                if kind == "queued":
                    yield pb.GenerateResponse(queued=pb.GenerateQueued(id=plan.id, position=response.queued.position))
                elif kind == "progress":
                    yield pb.GenerateResponse(progress=await _progress(plan, response.progress, previews))
                else:
                    ledger.backends["diffusion"] = response.result.backend
                    for i, backend in enumerate(response.result.control_backends):
                        ledger.backends[f"controlnet[{i}]"] = backend
                    yield response.result


async def _progress(
    plan: Plan, told: diffusion_service_pb2.SampleProgress, previews: Previews | None
) -> pb.GenerateProgress:
    shown: list[bytes] = []
    if previews is not None and told.HasField("preview"):
        shown = await asyncio.to_thread(previews.jpegs, told.preview, plan.width, plan.height)
    return pb.GenerateProgress(step=told.step, steps=told.steps, previews=shown)


async def _decode(mesh: Mesh, plan: Plan, sampled: SampleResult, ledger: Ledger) -> Array:
    request = vae_service_pb2.DecodeLatentsRequest(model=plan.model, latents=sampled.outputs["latents"])
    with ledger.metrics.stage.time("vae"):
        answer = await mesh.vae.unary(mesh.decode.DecodeLatents, request, ledger.hop("vae"))
    ledger.backends["vae"] = answer.backend
    return from_proto(answer.images, "images", dtypes=["uint8"], shape=(len(plan.seeds), None, None, 3))


async def _pack(plan: Plan, sampled: SampleResult, images: Array, ledger: Ledger) -> pb.GenerateResult:
    with ledger.metrics.stage.time("png"):
        files = [
            await asyncio.to_thread(encode_png, image, describe(plan, sampled.scheduler, i))
            for i, image in enumerate(images)
        ]
    parameters = pb.GenerateParameters(
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        model=plan.model,
        width=plan.width,
        height=plan.height,
        steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        scheduler=plan.scheduler or sampled.scheduler,
        seed=plan.seeds[0],
        clip_skip=plan.clip_skip,
        backends=ledger.backends,
        variation_seed=plan.variation_seeds[0] if plan.variation_seeds else None,
        variation_strength=plan.variation_strength,
    )
    pictures = [pb.GeneratedImage(png=png, seed=seed) for png, seed in zip(files, plan.seeds, strict=True)]
    return pb.GenerateResult(id=plan.id, images=pictures, parameters=parameters, timings=ledger.timings())
