"""A generation request with every default and drawn value filled in, and every value checked."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import preprocess_service_pb2, priority_pb2
from imagemesh.v1.diffusion_service_pb2 import ControlSavings
from imagemesh_gateway.json_values import check_values
from imagemesh_gateway.looks import LookPlan, look_plan
from imagemesh_gateway.mesh import Mesh, ModelInfo
from imagemesh_gateway.modes import HiresPlan, ImagePlan, hires_plan, image_plan
from imagemesh_gateway.references import ReferencePlan, reference_plans
from imagemesh_runtime.control_types import find_control_type
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import (
    MAX_CONTROL_SCALE,
    MAX_CONTROLS,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    check_block_weights,
    check_interval,
    check_pixels,
    check_prompt,
    check_range,
    check_size,
)
from imagemesh_runtime.savings import check_savings

# For models that don't say what suits them.
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 7.5
DEFAULT_GUIDER = "CFG"


@dataclass(frozen=True)
class ControlPlan:
    """A control unit: a ControlNet, the picture that it follows (not decoded yet), its weight and when it steers."""

    model: str
    request: pb.GenerateControl
    scale: float
    # The part of the evaluations.
    start: float = 0.0
    end: float = 1.0
    # What makes of the picture what is followed, without the picture; None: it is that already.
    preprocess: preprocess_service_pb2.PreprocessRequest | None = None
    # Of a ControlNet-union: which of its kinds the picture is.
    control_type: int | None = None
    # Whether the model is a T2I-Adapter, which is asked once.
    once: bool = False


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
    # What the model's own is called, if its service says so.
    own_scheduler: str
    clip_skip: int
    seeds: tuple[int, ...]
    controls: tuple[ControlPlan, ...]
    # None: from noise alone.
    image: ImagePlan | None = None
    variation_seeds: tuple[int, ...] = ()
    variation_strength: float = 0.0
    scheduler_options: Mapping[str, str] = field(default_factory=dict)
    # Empty: classifier-free guidance.
    guider: str = ""
    guider_options: Mapping[str, str] = field(default_factory=dict)
    priority: "priority_pb2.Priority.ValueType" = priority_pb2.PRIORITY_UNSPECIFIED
    # Steps between two previews; 0: none.
    preview_every: int = 0
    hires: HiresPlan | None = None
    # Whether the model is made for inpainting, and so sees the picture without what is redrawn.
    inpaints: bool = False
    # Whether brackets of the prompts are text.
    literal_prompt: bool = False
    # Pictures to be like.
    references: tuple[ReferencePlan, ...] = ()
    # What to save on the ControlNets.
    savings: ControlSavings = field(default_factory=ControlSavings)
    # What looks at the pictures, and which are kept.
    look: LookPlan = field(default_factory=LookPlan)

    @property
    def guided(self) -> bool:
        """Whether there is guidance by the negative prompt."""
        return self.guidance_scale > 1


async def make_plan(request: pb.GenerateRequest, mesh: Mesh) -> Plan:
    """Check the request against the limits and the model that it names.

    Raises:
        InvalidArgument, NotFound: a value isn't allowed, or there is no such model.
    """
    _check_texts(request)
    model = await mesh.catalogue.find(mesh.diffusion, request.model)
    steps, guidance = _steps_and_guidance(request, model)
    seeds = _seeds(request, *(size := _size(request, model)))
    controls = await _controls(request, mesh)
    return Plan(
        id=secrets.token_hex(8),
        model=model.name,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=size[0],
        height=size[1],
        steps=steps,
        guidance_scale=guidance,
        scheduler=request.scheduler,
        own_scheduler=model.properties.get("scheduler", ""),
        clip_skip=request.clip_skip,
        seeds=seeds,
        controls=controls,
        image=image_plan(request, steps, model),
        variation_seeds=_variation_seeds(request, len(seeds)),
        variation_strength=request.variation_strength,
        scheduler_options=dict(request.scheduler_options),
        guider=request.guider,
        guider_options=dict(request.guider_options),
        priority=_priority(request),
        preview_every=_preview_every(request),
        hires=hires_plan(request, *size, steps, int(model.properties["multiple"])),
        inpaints=model.properties.get("needs") == "mask",
        literal_prompt=request.literal_prompt,
        references=await reference_plans(request, mesh),
        savings=_savings(request, controls),
        look=await look_plan(request, seeds, mesh),
    )


def _check_texts(request: pb.GenerateRequest) -> None:
    check_prompt("prompt", request.prompt)
    check_prompt("negative_prompt", request.negative_prompt)
    check_values("scheduler_options", request.scheduler_options)
    check_values("guider_options", request.guider_options)
    for i, unit in enumerate(request.controls):
        check_values(f"controls[{i}].preprocessor_parameters", unit.preprocessor_parameters)


def _steps_and_guidance(request: pb.GenerateRequest, model: ModelInfo) -> tuple[int, float]:
    """As asked, or else as suits the model."""
    default_steps = int(model.properties.get("steps", DEFAULT_STEPS))
    default_guidance = float(model.properties.get("guidance_scale", DEFAULT_GUIDANCE))
    steps = request.steps if request.HasField("steps") else default_steps
    check_range("steps", steps, 1, MAX_STEPS)
    guidance = request.guidance_scale if request.HasField("guidance_scale") else default_guidance
    check_range("guidance_scale", guidance, 0, MAX_GUIDANCE)
    return steps, guidance


def _priority(request: pb.GenerateRequest) -> "priority_pb2.Priority.ValueType":
    if request.priority not in priority_pb2.Priority.values():
        raise InvalidArgument("priority", request.priority, ", ".join(priority_pb2.Priority.keys()))
    return request.priority


def _preview_every(request: pb.GenerateRequest) -> int:
    check_range("preview_every", request.preview_every, 0, MAX_STEPS)
    return request.preview_every


def _size(request: pb.GenerateRequest, model: ModelInfo) -> tuple[int, int]:
    multiple = int(model.properties["multiple"])
    width = request.width or int(model.properties["width"])
    height = request.height or int(model.properties["height"])
    check_size("width", width, multiple)
    check_size("height", height, multiple)
    return width, height


def _seeds(request: pb.GenerateRequest, width: int, height: int) -> tuple[int, ...]:
    seeds = _drawn_seeds(request)
    check_pixels("seeds" if request.seeds else "num_images", len(seeds), width, height)
    return seeds


def _drawn_seeds(request: pb.GenerateRequest) -> tuple[int, ...]:
    if request.seeds:
        for name in ("seed", "num_images"):
            if request.HasField(name):
                raise InvalidArgument(name, getattr(request, name), "absent where seeds are given")
        check_range("seeds", len(request.seeds), 1, MAX_IMAGES)
        for i, seed in enumerate(request.seeds):
            check_range(f"seeds[{i}]", seed, 0, MAX_SEED)
        return tuple(request.seeds)
    count = request.num_images if request.HasField("num_images") else 1
    check_range("num_images", count, 1, MAX_IMAGES)
    seed = request.seed if request.HasField("seed") else secrets.randbelow(2**32)
    check_range("seed", seed, 0, MAX_SEED - count)
    return tuple(range(seed, seed + count))


def _variation_seeds(request: pb.GenerateRequest, count: int) -> tuple[int, ...]:
    check_range("variation_strength", request.variation_strength, 0, 1)
    if not request.variation_strength:
        if request.HasField("variation_seed"):
            raise InvalidArgument("variation_strength", 0.0, "above 0 where variation_seed is given")
        return ()
    seed = request.variation_seed if request.HasField("variation_seed") else secrets.randbelow(2**32)
    check_range("variation_seed", seed, 0, MAX_SEED - count)
    return tuple(range(seed, seed + count))


def _savings(request: pb.GenerateRequest, controls: Sequence[ControlPlan]) -> ControlSavings:
    """The request's; a T2I-Adapter, which is asked once, has nothing to save on."""
    check_savings(request.control_savings, sum(not one.once for one in controls))
    return request.control_savings


async def _controls(request: pb.GenerateRequest, mesh: Mesh) -> tuple[ControlPlan, ...]:
    check_range("controls", len(request.controls), 0, MAX_CONTROLS)
    plans = []
    for i, unit in enumerate(request.controls):
        scale = unit.scale if unit.HasField("scale") else 1.0
        check_range(f"controls[{i}].scale", scale, 0, MAX_CONTROL_SCALE)
        start, end = unit.start, unit.end if unit.HasField("end") else 1.0
        check_interval(f"controls[{i}]", start, end)
        check_block_weights(f"controls[{i}].block_weights", unit.block_weights)
        model = await mesh.catalogue.find(mesh.controlnet, unit.model)
        kinds = int(model.properties.get("control_types", 0))
        kind = find_control_type(f"controls[{i}].control_type", unit.control_type, kinds)
        preprocess = await mesh.preprocessors.wanted(unit, f"controls[{i}]")
        once = model.properties.get("class") == "T2IAdapter"
        if once and (unit.guess_mode or unit.block_weights):
            name = "guess_mode" if unit.guess_mode else "block_weights"
            raise InvalidArgument(
                f"controls[{i}].{name}", getattr(unit, name), f"absent: {model.name} is a T2I-Adapter"
            )
        plans.append(ControlPlan(model.name, unit, scale, start, end, preprocess, kind, once))
    return tuple(plans)
