"""Pictures on their way out (PNG with what made them) and control pictures on their way in."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo

from imagemesh_gateway.plan import ImagePlan, Plan
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import decode
from imagemesh_runtime.tensors import Array


def encode_png(image: Array, parameters: str) -> bytes:
    """uint8 [height, width, 3] as a PNG file with a "parameters" text chunk."""
    info = PngInfo()
    info.add_itxt("parameters", parameters)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def describe(plan: Plan, scheduler: str, index: int) -> str:
    """What made a picture of the plan, in the form that AUTOMATIC1111's tools read."""
    lines = [plan.prompt]
    if plan.negative_prompt:
        lines.append(f"Negative prompt: {plan.negative_prompt}")
    fields: dict[str, object] = {
        "Steps": plan.steps,
        "Sampler": plan.scheduler or scheduler,
        "CFG scale": f"{plan.guidance_scale:g}",
        "Seed": plan.seeds[index],
        "Size": f"{plan.width}x{plan.height}",
        "Model": plan.model,
    }
    if plan.variation_seeds:
        fields["Variation seed"] = plan.variation_seeds[index]
        fields["Variation seed strength"] = f"{plan.variation_strength:g}"
    fields |= {name: value.strip('"') for name, value in sorted(plan.scheduler_options.items())}
    if plan.image is not None:
        fields["Denoising strength"] = f"{plan.image.strength:g}"
    if plan.clip_skip:
        fields["Clip skip"] = plan.clip_skip + 1  # its users count from 1
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def control_picture(plan: Plan, index: int) -> Array:
    """The unit's picture at the size of the generation, resized as diffusers' pipelines do (Lanczos).

    Raises:
        InvalidArgument: it isn't a picture.
    """
    return _fit(decode(plan.controls[index].request.image, f"controls[{index}].image"), plan)


@dataclass(frozen=True)
class Sources:
    """What a generation starts from: the picture, uint8 [height, width, 3], and where it is redrawn.

    Attributes:
        mask: uint8 [height, width], 1 where it is redrawn, as diffusers' mask processor has it; None: everywhere.
        overlay: float32 [height, width, 1], how much of the original lies over the result, 0 to 1; None: nothing.
    """

    image: Array
    mask: Array | None = None
    overlay: Array | None = None


def sources(plan: Plan, image: ImagePlan) -> Sources:
    """The request's pictures at the size of the generation.

    Raises:
        InvalidArgument: one isn't a picture, or the mask leaves nothing to redraw.
    """
    pixels = _fit(decode(image.image, "image"), plan)
    if image.mask is None:
        return Sources(pixels)
    grey = Image.fromarray(_fit(decode(image.mask, "mask"), plan)).convert("L")
    if image.invert_mask:
        grey = ImageOps.invert(grey)
    if image.mask_blur:
        grey = grey.filter(ImageFilter.GaussianBlur(image.mask_blur))
    soft = np.asarray(grey, dtype=np.float32) / 255
    mask = (soft >= 0.5).astype(np.uint8)
    if not mask.any():
        raise InvalidArgument("mask", "a mask that is dark everywhere", "bright where the picture is to be redrawn")
    return Sources(pixels, mask, (1 - soft)[..., None] if image.keep_unmasked else None)


def lay_over(made: Array, source: Sources) -> Array:
    """The generation, uint8 [height, width, 3], with the original over it where nothing was to be redrawn."""
    if source.overlay is None:
        return made
    mixed = made * (1 - source.overlay) + source.image * source.overlay
    return np.asarray(mixed.round(), dtype=np.uint8)


def _fit(pixels: Array, plan: Plan) -> Array:
    """Resized as diffusers' pipelines do (Lanczos)."""
    if pixels.shape[:2] == (plan.height, plan.width):
        return pixels
    resized = Image.fromarray(pixels).resize((plan.width, plan.height), Image.Resampling.LANCZOS)
    return np.asarray(resized)
