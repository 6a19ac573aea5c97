"""A generation request with every default and drawn value filled in, and every value checked."""

import secrets
from dataclasses import dataclass

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.limits import (
    MAX_CONTROL_SCALE,
    MAX_CONTROLS,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    check_pixels,
    check_prompt,
    check_range,
    check_size,
)

# For models that don't say what suits them.
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 7.5


@dataclass(frozen=True)
class ControlPlan:
    """A control unit: a ControlNet, the picture that it follows (not decoded yet) and its weight."""

    model: str
    request: pb.GenerateControl
    scale: float


@dataclass(frozen=True)
class Plan:
    """What will be generated."""

    id: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    clip_skip: int
    seeds: tuple[int, ...]
    controls: tuple[ControlPlan, ...]

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance_scale > 1


async def make_plan(request: pb.GenerateRequest, mesh: Mesh) -> Plan:
    """Check the request against the limits and the model that it names.

    Raises:
        InvalidArgument: a value isn't allowed.
        NotFound: there is no such model.
    """
    check_prompt("prompt", request.prompt)
    check_prompt("negative_prompt", request.negative_prompt)
    model = await mesh.catalogue.find(mesh.diffusion, request.model)
    default_steps = int(model.properties.get("steps", DEFAULT_STEPS))
    default_guidance = float(model.properties.get("guidance_scale", DEFAULT_GUIDANCE))
    steps = request.steps if request.HasField("steps") else default_steps
    check_range("steps", steps, 1, MAX_STEPS)
    guidance = request.guidance_scale if request.HasField("guidance_scale") else default_guidance
    check_range("guidance_scale", guidance, 0, MAX_GUIDANCE)
    multiple = int(model.properties["multiple"])
    width = request.width or int(model.properties["width"])
    height = request.height or int(model.properties["height"])
    check_size("width", width, multiple)
    check_size("height", height, multiple)
    seeds = _seeds(request)
    check_pixels("num_images", len(seeds), width, height)
    return Plan(
        id=secrets.token_hex(8),
        model=model.name,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance,
        scheduler=request.scheduler,
        clip_skip=request.clip_skip,
        seeds=seeds,
        controls=await _controls(request, mesh),
    )


def _seeds(request: pb.GenerateRequest) -> tuple[int, ...]:
    count = request.num_images if request.HasField("num_images") else 1
    check_range("num_images", count, 1, MAX_IMAGES)
    seed = request.seed if request.HasField("seed") else secrets.randbelow(2**32)
    check_range("seed", seed, 0, MAX_SEED - count)
    return tuple(range(seed, seed + count))


async def _controls(request: pb.GenerateRequest, mesh: Mesh) -> tuple[ControlPlan, ...]:
    check_range("controls", len(request.controls), 0, MAX_CONTROLS)
    plans = []
    for i, unit in enumerate(request.controls):
        scale = unit.scale if unit.HasField("scale") else 1.0
        check_range(f"controls[{i}].scale", scale, 0, MAX_CONTROL_SCALE)
        model = await mesh.catalogue.find(mesh.controlnet, unit.model)
        plans.append(ControlPlan(model.name, unit, scale))
    return tuple(plans)
