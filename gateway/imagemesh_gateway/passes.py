"""The passes of a generation and what each starts from: noise, a picture, or the pass before."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from imagemesh.v1 import diffusion_service_pb2, tensor_pb2, vae_service_pb2
from imagemesh_gateway.ledger import Ledger
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.modes import LATENT_UPSCALERS, PICTURE_UPSCALERS
from imagemesh_gateway.plan import Plan
from imagemesh_gateway.sources import Sources, sources
from imagemesh_runtime.parcels import Parcel
from imagemesh_runtime.tensors import Array, from_proto, to_proto

Tensors = dict[str, tensor_pb2.Tensor]


@dataclass(frozen=True)
class Start:
    """Named inputs of the sampler, how much of the schedule it runs, how it resizes latents, and what it is like."""

    inputs: Tensors = field(default_factory=dict)
    strength: float = 0.0
    latent_resize: str = ""
    references: Sequence[diffusion_service_pb2.Reference] = ()


@dataclass(frozen=True)
class Turn:
    """One pass: its plan, and the steps of those before and after it; how many its own are, the sampler says."""

    plan: Plan
    before: int = 0
    after: int = 0
    # The names of its stages end with it.
    suffix: str = ""
    # Steps of the schedule of the pass before.
    prior_steps: int = 0


def turns(plan: Plan) -> Iterator[Turn]:
    """The passes, in their order."""
    hires = plan.hires
    if hires is None:
        yield Turn(plan)
        return
    second = min(int(hires.steps * hires.strength), hires.steps)
    yield Turn(plan, after=second)
    larger = replace(
        plan, width=hires.width, height=hires.height, steps=hires.steps, scheduler=hires.scheduler,
        variation_strength=0.0, variation_seeds=(),
    )  # fmt: skip
    yield Turn(larger, before=plan.steps, suffix="-hires", prior_steps=plan.steps)


async def first_start(mesh: Mesh, plan: Plan, ledger: Ledger) -> tuple[Sources | None, Start]:
    """What the first pass starts from, and the pictures themselves if it is not noise alone."""
    if plan.image is None:
        return None, Start()
    with ledger.metrics.stage.time("source-pictures"):
        source = await asyncio.to_thread(sources, plan, plan.image)
    if not plan.inpaints:
        inputs = await _moments(mesh, plan, source.image[None], ledger, "vae-encode")
    else:
        both = await _moments(mesh, plan, await asyncio.to_thread(source.without_masked), ledger, "vae-encode")
        inputs = {}
        for name, tensor in both.items():
            rows = from_proto(tensor, name, dtypes=["float32"], shape=(2, None, None, None))
            inputs |= {name: to_proto(rows[:1]), f"masked_{name}": to_proto(rows[1:])}
    if source.mask is not None:
        inputs["mask"] = to_proto(source.mask[None, None])
    return source, Start(inputs, plan.image.strength)


async def second_start(mesh: Mesh, turn: Turn, latents: tensor_pb2.Tensor, ledger: Ledger) -> Start:
    """What the second pass starts from: the latents of the first, or its pictures enlarged."""
    plan, hires = turn.plan, turn.plan.hires
    assert hires is not None
    if hires.upscaler in LATENT_UPSCALERS:
        return Start({"image_latents": latents}, hires.strength, LATENT_UPSCALERS[hires.upscaler])
    images = await decode_latents(mesh, plan, latents, ledger, "vae-first")
    with ledger.metrics.stage.time("upscale"):
        larger = await asyncio.to_thread(_enlarged, images, plan, PICTURE_UPSCALERS[hires.upscaler])
    return Start(await _moments(mesh, plan, larger, ledger, "vae-encode"), hires.strength)


async def decode_latents(
    mesh: Mesh, plan: Plan, latents: tensor_pb2.Tensor, ledger: Ledger, stage: str = "vae"
) -> Array:
    """uint8 [pictures, height, width, 3] of scaled latents."""
    request = vae_service_pb2.DecodeLatentsRequest(model=plan.model, latents=latents)
    with ledger.metrics.stage.time(stage):
        answer: Parcel[vae_service_pb2.DecodeLatentsResponse] = await mesh.vae.unary(
            mesh.pictures.DecodeLatents, request, ledger.hop(stage)
        )
    ledger.backends[stage] = answer.message.backend
    return answer.array(answer.message.images, "images", dtypes=["uint8"], shape=(len(plan.seeds), None, None, 3))


async def _moments(mesh: Mesh, plan: Plan, images: Array, ledger: Ledger, stage: str) -> Tensors:
    """The distribution of the pictures' latents, by the sampler's names."""
    request = Parcel[vae_service_pb2.EncodeImagesRequest]()
    request.seal(vae_service_pb2.EncodeImagesRequest(model=plan.model, images=request.add(images)))
    with ledger.metrics.stage.time(stage):
        answer = await mesh.vae.unary(mesh.pictures.EncodeImages, request, ledger.hop(stage))
    told = answer.message
    ledger.backends[stage] = told.backend
    moments = {"image_mean": told.mean, "image_log_variance": told.log_variance}
    return {name: to_proto(answer.array(tensor, name)) for name, tensor in moments.items()}


def _enlarged(images: Array, plan: Plan, filter: Image.Resampling) -> Array:
    size = (plan.width, plan.height)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, filter)) for image in images])
