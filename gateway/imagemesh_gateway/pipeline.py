"""How a picture is made: encode the text, encode the picture, prepare the control pictures, denoise, decode, pack."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from imagemesh.v1 import diffusion_service_pb2, text_encoder_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.controls import Controls, prepare_controls
from imagemesh_gateway.ledger import Ledger
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.passes import Start, Tensors, Turn, decode_latents, first_start, second_start, turns
from imagemesh_gateway.pictures import describe, encode_png
from imagemesh_gateway.placement import sample
from imagemesh_gateway.plan import DEFAULT_GUIDER, Plan
from imagemesh_gateway.previews import Previews
from imagemesh_gateway.references import embed_references
from imagemesh_gateway.sources import lay_over
from imagemesh_runtime.errors import Unavailable
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array

SampleResult = diffusion_service_pb2.SampleResult
EncodedText = text_encoder_service_pb2.EncodeTextResponse


async def generate(mesh: Mesh, plan: Plan, metrics: Metrics) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Run the request graph for one generation; the last event is the result.

    Raises:
        MeshError: a stage failed; the error names the service or the field.
    """
    ledger = Ledger(metrics)
    text = await _encode_text(mesh, plan, ledger)
    references = await embed_references(mesh, plan.references, ledger)
    source, start = await first_start(mesh, plan, ledger)
    start = replace(start, references=references)
    sampled: SampleResult | None = None
    for turn in turns(plan):
        if sampled is not None:
            if text.scheduled:
                text = await _encode_text(mesh, turn.plan, ledger, turn)
            second = await second_start(mesh, turn, sampled.outputs["latents"], ledger)
            start = replace(second, references=references)
        sampled = None
        async with aclosing(_denoise(mesh, turn, dict(text.conditioning), start, ledger)) as events:
            async for event in events:
                if isinstance(event, pb.GenerateResponse):
                    yield event
                else:
                    sampled = event
        if sampled is None:
            raise Unavailable("diffusion", "the stream ended without a result")
    assert sampled is not None
    images = await decode_latents(mesh, plan, sampled.outputs["latents"], ledger)
    if source is not None:
        images = np.stack([await asyncio.to_thread(lay_over, image, source) for image in images])
    yield pb.GenerateResponse(result=await _pack(plan, sampled, images, ledger))


async def _encode_text(mesh: Mesh, plan: Plan, ledger: Ledger, turn: Turn | None = None) -> EncodedText:
    """The prompts for the first pass, or for ``turn``."""
    suffix, prior_steps = (turn.suffix, turn.prior_steps) if turn is not None else ("", 0)
    request = text_encoder_service_pb2.EncodeTextRequest(
        model=plan.model,
        prompt=plan.prompt,
        clip_skip=plan.clip_skip,
        literal=plan.literal_prompt,
        steps=plan.steps,
        prior_steps=prior_steps,
    )
    if plan.guided:
        request.negative_prompt = plan.negative_prompt
    with ledger.metrics.stage.time("text-encoder"):
        answer: EncodedText = await mesh.text_encoder.unary(
            mesh.encode.EncodeText, request, ledger.hop(f"text-encoder{suffix}")
        )
    ledger.backends["text-encoder"] = answer.backend
    return answer


def _sample_request(
    plan: Plan, conditioning: Tensors, start: Start, controls: Controls
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
        controls=controls.units,
        features=controls.features,
        control_savings=plan.savings if controls.units else None,
        inputs=start.inputs,
        strength=start.strength,
        latent_resize=start.latent_resize,
        priority=plan.priority,
        variation_seeds=plan.variation_seeds,
        variation_strength=plan.variation_strength,
        scheduler_options=plan.scheduler_options,
        guider=plan.guider,
        guider_options=plan.guider_options,
        preview_every=plan.preview_every,
        references=start.references,
    )


async def _denoise(
    mesh: Mesh, turn: Turn, conditioning: Tensors, start: Start, ledger: Ledger
) -> AsyncGenerator[pb.GenerateResponse | SampleResult, None]:
    plan = turn.plan
    controls = await prepare_controls(mesh, turn, ledger)
    request = _sample_request(plan, conditioning, start, controls)
    previews = await Previews.of(mesh, plan.model) if plan.preview_every else None
    with ledger.metrics.stage.time("diffusion"):
        stream = sample(
            mesh.diffusion, request, ledger.hop(f"diffusion{turn.suffix}"), ledger.metrics, mesh.checkpoint_every
        )
        async with aclosing(stream) as responses:
            async for response in responses:
                kind = response.WhichOneof("event")
                if kind == "queued" and not turn.before:
                    yield pb.GenerateResponse(queued=pb.GenerateQueued(id=plan.id, position=response.queued.position))
                elif kind == "progress":
                    yield pb.GenerateResponse(progress=await _progress(turn, response.progress, previews))
                elif kind == "result":
                    ledger.backends["diffusion"] = response.result.backend
                    for i, backend in zip(controls.places, response.result.control_backends, strict=False):
                        ledger.backends[f"controlnet[{i}]"] = backend
                    yield response.result


async def _progress(
    turn: Turn, told: diffusion_service_pb2.SampleProgress, previews: Previews | None
) -> pb.GenerateProgress:
    shown: list[bytes] = []
    if previews is not None and told.HasField("preview"):
        shown = await asyncio.to_thread(previews.jpegs, told.preview, turn.plan.width, turn.plan.height)
    total = turn.before + told.steps + turn.after
    return pb.GenerateProgress(step=turn.before + told.step, steps=total, previews=shown)


async def _pack(plan: Plan, sampled: SampleResult, images: Array, ledger: Ledger) -> pb.GenerateResult:
    scheduler = plan.scheduler or plan.own_scheduler or sampled.scheduler
    with ledger.metrics.stage.time("png"):
        files = [
            await asyncio.to_thread(encode_png, image, describe(plan, scheduler, i, sampled.lossy))
            for i, image in enumerate(images)
        ]
    parameters = pb.GenerateParameters(
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        model=plan.model,
        width=images.shape[2],
        height=images.shape[1],
        steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        scheduler=scheduler,
        seed=plan.seeds[0],
        clip_skip=plan.clip_skip,
        backends=ledger.backends,
        variation_seed=plan.variation_seeds[0] if plan.variation_seeds else None,
        variation_strength=plan.variation_strength,
        guider=plan.guider or DEFAULT_GUIDER,
        guider_options=plan.guider_options,
        lossy=sampled.lossy,
    )
    pictures = [pb.GeneratedImage(png=png, seed=seed) for png, seed in zip(files, plan.seeds, strict=True)]
    return pb.GenerateResult(id=plan.id, images=pictures, parameters=parameters, timings=ledger.timings())
