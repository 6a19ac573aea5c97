"""From arguments to requests. What the gateway can judge better is left to it; here only what a field can't hold."""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypedDict, Unpack

from imagemesh.v1 import diffusion_service_pb2, priority_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_client.fields import UINT32, UINT64, whole_or_absent
from imagemesh_client.fields import number as _number
from imagemesh_client.fields import text as _text
from imagemesh_client.fields import whole as _whole
from imagemesh_client.images import ImageInput, image_to_proto
from imagemesh_client.preprocessing import parameters_to_proto
from imagemesh_client.types import Classify, Control, ControlSavings, Embed, Hires, Keep, Reference
from imagemesh_client.vision import POOLINGS
from imagemesh_runtime.errors import InvalidArgument

PriorityName = Literal["interactive", "normal", "batch"]
_PRIORITIES = {
    "interactive": priority_pb2.PRIORITY_INTERACTIVE,
    "normal": priority_pb2.PRIORITY_NORMAL,
    "batch": priority_pb2.PRIORITY_BATCH,
}


class SourceOptions(TypedDict, total=False):
    """What to start from, where not from noise alone."""

    # Start from this picture (image to image).
    image: ImageInput | None
    # How much of it is made anew, above 0 to 1. None: 0.8, or 1 with a mask.
    strength: float | None
    # Redraw only where this picture is bright (inpainting).
    mask: ImageInput | None
    invert_mask: bool
    # Pixels.
    mask_blur: int
    # Lay the original over the rest, which has else been through the VAE.
    keep_unmasked: bool
    # Crop to the masked part and this many pixels around it, redraw that at the generation's size, and lay it back.
    mask_padding: int | None


class NoiseOptions(TypedDict, total=False):
    """Which noise to start from."""

    # Picture i of n takes seed + i. None: drawn.
    seed: int | None
    # How many pictures.
    n: int
    # A seed a picture, instead of seed and n.
    seeds: Iterable[int]
    # 0 to 1: how far each picture's noise is turned towards that of another seed.
    variation_strength: float
    # Picture i takes variation_seed + i. None: drawn.
    variation_seed: int | None


class CourseOptions(TypedDict, total=False):
    """How it goes on its way, which changes nothing of the picture."""

    # Who goes first where requests wait. None: normal.
    priority: PriorityName | None
    # Steps between two previews in ``Progress``. 0: none.
    preview_every: int


class PromptOptions(TypedDict, total=False):
    """How prompts are read."""

    # Brackets are text, and neither weigh words nor change them from step to step.
    literal_prompt: bool


class GuiderOptions(TypedDict, total=False):
    """How guidance is done."""

    # "CFG" (the default), "APG", "PAG"...; ``sampling()`` tells them.
    guider: str
    # Of the guider, such as {"guidance_rescale": 0.7}.
    guider_options: Mapping[str, bool | float | str | Sequence[str]]


class ReferenceOptions(TypedDict, total=False):
    """What to be like."""

    references: Iterable[Reference]


class SavingsOptions(TypedDict, total=False):
    """What to save."""

    control_savings: ControlSavings | None


class LookOptions(TypedDict, total=False):
    """What to see of the pictures once they are made, and which to keep."""

    classify: Classify | None
    embed: Embed | None
    keep: Keep | None


class _Shared(
    SourceOptions,
    NoiseOptions,
    CourseOptions,
    PromptOptions,
    GuiderOptions,
    ReferenceOptions,
    SavingsOptions,
    LookOptions,
    total=False,
):
    """What ``GenerateOptions`` and ``MoreOptions`` both have."""


class GenerateOptions(_Shared, total=False):
    """How to generate. What is left out, the mesh chooses and tells in ``Generation.parameters``."""

    negative_prompt: str
    # A name that ``models()`` lists for the role "diffusion".
    model: str
    # None: what suits the model, 20 if it doesn't say.
    steps: int | None
    # Classifier-free guidance. None: what suits the model, 7.5 if it doesn't say.
    guidance: float | None
    # Pixels. None: the model's own size.
    width: int | None
    height: int | None
    # "Euler a", "DPM++ 2M Karras"..., or a diffusers class name.
    scheduler: str
    # Of the named scheduler, such as {"solver_order": 3}; ``sampling()`` tells them.
    scheduler_options: Mapping[str, bool | float | str]
    # Layers of the text encoder to leave out, from the last.
    clip_skip: int
    controls: Iterable[Control]
    # Make it larger in a second pass.
    hires: Hires | None


class MoreOptions(_Shared, total=False):
    """What ``generate_request`` hands on."""


def generate_request(
    prompt: str,
    *,
    negative_prompt: str = "",
    model: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    scheduler: str = "",
    scheduler_options: Mapping[str, bool | float | str] = MappingProxyType({}),
    clip_skip: int = 0,
    controls: Iterable[Control] = (),
    hires: Hires | None = None,
    **more: Unpack[MoreOptions],
) -> pb.GenerateRequest:
    """The request for ``GenerateOptions``; reads the files of pictures.

    Raises:
        InvalidArgument: a value that its field can't hold.
    """
    if unknown := sorted(set(more) - set(MoreOptions.__annotations__)):
        raise TypeError(f"generate takes no option {', '.join(unknown)}")
    return pb.GenerateRequest(
        prompt=_text("prompt", prompt),
        negative_prompt=_text("negative_prompt", negative_prompt),
        model=_text("model", model),
        width=whole_or_absent("width", width),
        height=whole_or_absent("height", height),
        steps=None if steps is None else _whole("steps", steps, UINT32),
        guidance_scale=None if guidance is None else _number("guidance", guidance),
        scheduler=_text("scheduler", scheduler),
        scheduler_options={_text("scheduler_options", name): json.dumps(v) for name, v in scheduler_options.items()},
        clip_skip=_whole("clip_skip", clip_skip, UINT32),
        controls=[_control(f"controls[{i}]", control) for i, control in enumerate(controls)],
        hires=None if hires is None else _hires(hires),
        **_noise(more) | _guider(more),
        **_source(more),
        **_course(more) | _references(more) | _look(more),
    )


def _hires(hires: Hires) -> pb.GenerateHires:
    scale = 0.0 if hires.scale is None else _number("hires.scale", hires.scale)
    if hires.scale is not None and scale == 0:
        raise InvalidArgument("hires.scale", hires.scale, "above 1")
    width, height = (None, None) if hires.size is None else hires.size
    return pb.GenerateHires(
        scale=scale,
        width=whole_or_absent("hires.size[0]", width),
        height=whole_or_absent("hires.size[1]", height),
        upscaler=_text("hires.upscaler", hires.upscaler),
        steps=None if hires.steps is None else _whole("hires.steps", hires.steps, UINT32),
        strength=None if hires.strength is None else _number("hires.strength", hires.strength),
        scheduler=_text("hires.scheduler", hires.scheduler),
    )


def _course(options: MoreOptions) -> dict[str, Any]:
    """The fields of ``CourseOptions`` and ``PromptOptions``."""
    return {
        "literal_prompt": bool(options.get("literal_prompt", False)),
        "priority": _priority(options.get("priority")),
        "preview_every": _whole("preview_every", options.get("preview_every", 0), UINT32),
    }


def _guider(options: MoreOptions) -> dict[str, Any]:
    """The fields of ``GuiderOptions``."""
    given = options.get("guider_options", {})
    return {
        "guider": _text("guider", options.get("guider", "")),
        "guider_options": {_text("guider_options", name): json.dumps(value) for name, value in given.items()},
    }


def _priority(name: PriorityName | None) -> "priority_pb2.Priority.ValueType":
    if name is None:
        return priority_pb2.PRIORITY_UNSPECIFIED
    if name not in _PRIORITIES:
        raise InvalidArgument("priority", name, ", ".join(_PRIORITIES))
    return _PRIORITIES[name]


def _noise(options: MoreOptions) -> dict[str, Any]:
    """The fields of ``NoiseOptions``."""
    seed, variation_seed = options.get("seed"), options.get("variation_seed")
    seeds = [_whole(f"seeds[{i}]", one, UINT64) for i, one in enumerate(options.get("seeds", ()))]
    count = options.get("n", 1)
    return {
        "seed": None if seed is None else _whole("seed", seed, UINT64),
        "num_images": None if seeds and count == 1 else _whole("n", count, UINT32),
        "seeds": seeds,
        "variation_strength": _number("variation_strength", options.get("variation_strength", 0.0)),
        "variation_seed": None if variation_seed is None else _whole("variation_seed", variation_seed, UINT64),
    }


def _source(options: MoreOptions) -> dict[str, Any]:
    """The fields of ``SourceOptions``."""
    padding = options.get("mask_padding")
    image, strength, mask = options.get("image"), options.get("strength"), options.get("mask")
    return {
        "image": None if image is None else image_to_proto(image, "image"),
        "strength": None if strength is None else _number("strength", strength),
        "mask": None if mask is None else image_to_proto(mask, "mask"),
        "invert_mask": bool(options.get("invert_mask", False)),
        "mask_blur": _whole("mask_blur", options.get("mask_blur", 0), UINT32),
        "keep_unmasked": bool(options.get("keep_unmasked", False)),
        "mask_padding": None if padding is None else _whole("mask_padding", padding, UINT32),
    }


def _savings(savings: ControlSavings | None) -> diffusion_service_pb2.ControlSavings | None:
    if savings is None:
        return None
    return diffusion_service_pb2.ControlSavings(
        reuse_steps=_whole("control_savings.reuse_steps", savings.reuse_steps, UINT32),
        conditional_only=bool(savings.conditional_only),
        residuals=_text("control_savings.residuals", savings.residuals),
    )


def _references(options: MoreOptions) -> dict[str, Any]:
    """The fields of ``ReferenceOptions`` and ``SavingsOptions``."""
    references = [_reference(f"references[{i}]", one) for i, one in enumerate(options.get("references", ()))]
    return {"references": references, "control_savings": _savings(options.get("control_savings"))}


def _look(options: MoreOptions) -> dict[str, Any]:
    """The fields of ``LookOptions``."""
    classify, embed, keep = options.get("classify"), options.get("embed"), options.get("keep")
    fields: dict[str, Any] = {}
    if classify is not None:
        top_k = _whole("classify.top_k", classify.top_k, UINT32, least=1)
        fields["classify"] = pb.GenerateClassify(top_k=top_k, model=_text("classify.model", classify.model))
    if embed is not None:
        if embed.pooling not in POOLINGS:
            raise InvalidArgument("embed.pooling", embed.pooling, ", ".join(POOLINGS))
        fields["embed"] = pb.GenerateEmbed(
            model=_text("embed.model", embed.model),
            pooling=POOLINGS[embed.pooling],
            normalize=bool(embed.normalize),
        )
    if keep is not None:
        fields["keep"] = pb.GenerateKeep(
            label=_text("keep.label", keep.label),
            top_k=_whole("keep.top_k", keep.top_k, UINT32, least=1),
            min_probability=_number("keep.min_probability", keep.min_probability),
            retries=_whole("keep.retries", keep.retries, UINT32),
        )
    return fields


def _reference(field: str, reference: Reference) -> pb.GenerateReference:
    return pb.GenerateReference(
        image=image_to_proto(reference.image, f"{field}.image"),
        adapter=_text(f"{field}.adapter", reference.adapter),
        scale=_number(f"{field}.scale", reference.scale),
    )


def _control(field: str, control: Control) -> pb.GenerateControl:
    return pb.GenerateControl(
        model=_text(f"{field}.model", control.model),
        image=image_to_proto(control.image, f"{field}.image"),
        scale=_number(f"{field}.scale", control.scale),
        start=None if control.start == 0 else _number(f"{field}.start", control.start),
        end=None if control.end == 1 else _number(f"{field}.end", control.end),
        guess_mode=bool(control.guess_mode),
        block_weights=[_number(f"{field}.block_weights[{i}]", one) for i, one in enumerate(control.block_weights)],
        control_type=_text(f"{field}.control_type", control.control_type),
        preprocessor=_text(f"{field}.preprocessor", control.preprocessor),
        preprocessor_parameters=parameters_to_proto(f"{field}.parameters", control.parameters),
        preprocessor_resolution=whole_or_absent(f"{field}.resolution", control.resolution),
        preprocessor_model=_text(f"{field}.preprocessor_model", control.preprocessor_model),
    )
