"""How a picture is made: encode the text and the picture, prepare the control pictures, denoise, decode, look, pack."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from imagemesh.v1 import diffusion_service_pb2, text_encoder_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.ahead import ahead
from imagemesh_gateway.controls import Controls, prepare_controls
from imagemesh_gateway.costs import amount
from imagemesh_gateway.ledger import Ledger
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.passes import Start, Tensors, Turn, decode_latents, first_start, second_start, turns
from imagemesh_gateway.pictures import describe, encode_png
from imagemesh_gateway.placement import sample
from imagemesh_gateway.plan import DEFAULT_GUIDER, Plan
from imagemesh_gateway.previews import Previews
from imagemesh_gateway.references import embed_references
from imagemesh_gateway.seeing import Gallery, Picture
from imagemesh_gateway.sources import Sources, lay_over
from imagemesh_runtime.errors import Unavailable
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array

# Of one sampler's events; they wait for a caller who is slow to take them, and the sampler doesn't.
_EVENTS_AHEAD: Final = 64

SampleResult = diffusion_service_pb2.SampleResult
EncodedText = text_encoder_service_pb2.EncodeTextResponse


@dataclass(frozen=True)
class Beginning:
    """What all attempts share: the prompts' embeddings, the picture to start from, what the first pass starts from."""

    text: EncodedText
    source: Sources | None
    start: Start


@dataclass(frozen=True)
class Drawn:
    """What an attempt made: the sampler's last word, and the pictures, uint8 [pictures, height, width, 3]."""

    sampled: SampleResult
    images: Array


async def generate(mesh: Mesh, plan: Plan, metrics: Metrics) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Run the request graph for one generation; the last event is the result.

    Raises:
        MeshError: a stage failed; the error names the service or the field.
    """
    ledger = Ledger(metrics)
    beginning = await _begin(mesh, plan, ledger)
    gallery = Gallery(plan)
    drawn: Drawn | None = None
    before = 0
    for retry, attempt in gallery.attempts():
        ledger.suffix = f"-retry-{retry}" if retry else ""
        drawn, shown = None, pb.GenerateProgress()
        async with aclosing(_draw(mesh, attempt, beginning, ledger)) as events:
            async for event in events:
                if isinstance(event, Drawn):
                    drawn = event
                elif event.HasField("progress"):
                    shown = event.progress
                    shown.step, shown.steps = shown.step + before, shown.steps + before
                    yield event
                elif not retry:
                    yield event
        assert drawn is not None
        before = shown.steps
        await gallery.add(mesh, attempt, drawn.images, ledger)
    assert drawn is not None
    yield pb.GenerateResponse(result=await _pack(gallery, drawn, ledger))


async def _begin(mesh: Mesh, plan: Plan, ledger: Ledger) -> Beginning:
    text = await _encode_text(mesh, plan, ledger)
    references = await embed_references(mesh, plan.references, ledger)
    source, start = await first_start(mesh, plan, ledger)
    return Beginning(text, source, replace(start, references=references))


async def _draw(
    mesh: Mesh, plan: Plan, beginning: Beginning, ledger: Ledger
) -> AsyncGenerator[pb.GenerateResponse | Drawn, None]:
    """All passes, and the decoding; what was drawn comes last."""
    text, start, spent = beginning.text, beginning.start, ledger.device_seconds("diffusion")
    sampled: SampleResult | None = None
    for turn in turns(plan):
        if sampled is not None:
            if text.scheduled:
                text = await _encode_text(mesh, turn.plan, ledger, turn)
            second = await second_start(mesh, turn, sampled.outputs["latents"], ledger)
            start = replace(second, references=start.references)
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
    if (source := beginning.source) is not None:
        images = np.stack([await asyncio.to_thread(lay_over, image, source) for image in images])
    mesh.costs.note(plan.model, amount(plan), ledger.device_seconds("diffusion") - spent)
    yield Drawn(sampled, images)


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
        async with aclosing(ahead(stream, _EVENTS_AHEAD)) as responses:
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


async def _pack(gallery: Gallery, drawn: Drawn, ledger: Ledger) -> pb.GenerateResult:
    plan, sampled = gallery.plan, drawn.sampled
    scheduler = plan.scheduler or plan.own_scheduler or sampled.scheduler
    parameters = pb.GenerateParameters(
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        model=plan.model,
        width=drawn.images.shape[2],
        height=drawn.images.shape[1],
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
        classifier=plan.look.classifier,
        embedder=plan.look.embedder,
    )
    with ledger.metrics.stage.time("png"):
        pictures = [await asyncio.to_thread(_file, one, scheduler, sampled) for one in gallery.kept]
    return pb.GenerateResult(
        id=plan.id, images=pictures, parameters=parameters, timings=ledger.timings(), rejected=gallery.rejected
    )


def _file(picture: Picture, scheduler: str, sampled: SampleResult) -> pb.GeneratedImage:
    told = describe(picture.plan, scheduler, picture.row, sampled.lossy)
    return pb.GeneratedImage(
        png=encode_png(picture.pixels, told),
        seed=picture.plan.seeds[picture.row],
        index=picture.index,
        classification=picture.classification,
        embedding=picture.embedding,
    )
