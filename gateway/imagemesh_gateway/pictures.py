"""Pictures on their way out (PNG with what made them) and control pictures on their way in."""

import io
import json
import re
from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagemesh_gateway.plan import ControlPlan, Plan
from imagemesh_runtime.images import decode
from imagemesh_runtime.tensors import Array


def encode_png(image: Array, parameters: str) -> bytes:
    """uint8 [height, width, 3] as a PNG file with a "parameters" text chunk."""
    info = PngInfo()
    info.add_itxt("parameters", parameters)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def describe(plan: Plan, scheduler: str, index: int, lossy: Mapping[str, str]) -> str:
    """What made a picture of the plan, and what was saved at its cost, in the form that AUTOMATIC1111's tools read."""
    lines = [plan.prompt]
    if plan.negative_prompt:
        lines.append(f"Negative prompt: {plan.negative_prompt}")
    fields: dict[str, object] = {
        "Steps": plan.steps,
        "Sampler": scheduler,
        "CFG scale": f"{plan.guidance_scale:g}",
        "Seed": plan.seeds[index],
        "Size": f"{plan.width}x{plan.height}",
        "Model": plan.model,
    }
    if plan.variation_seeds:
        fields["Variation seed"] = plan.variation_seeds[index]
        fields["Variation seed strength"] = f"{plan.variation_strength:g}"
    fields |= {name: value.strip('"') for name, value in sorted(plan.scheduler_options.items())}
    if plan.guider:
        fields["Guider"] = plan.guider
    fields |= {name: _text(value) for name, value in sorted(plan.guider_options.items())}
    if plan.image is not None:
        fields["Denoising strength"] = f"{plan.image.strength:g}"
    if plan.hires is not None:
        fields["Hires resize"] = f"{plan.hires.width}x{plan.hires.height}"
        fields["Hires steps"] = plan.hires.steps
        fields["Hires upscaler"] = plan.hires.upscaler
        fields["Denoising strength"] = f"{plan.hires.strength:g}"
    for i, unit in enumerate(plan.controls):
        fields[f"ControlNet {i}"] = f'"{_control(unit)}"'
    for i, one in enumerate(plan.references):
        fields[f"IP-Adapter {i}"] = f'"Model: {one.adapter}, Weight: {one.scale:g}"'
    fields |= {name.replace("_", " ").capitalize(): value for name, value in sorted(lossy.items())}
    if plan.clip_skip:
        fields["Clip skip"] = plan.clip_skip + 1  # its users count from 1
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def _control(unit: ControlPlan) -> str:
    """As AUTOMATIC1111's ControlNet extension writes it, what is by default left out."""
    told = [f"Module: {unit.preprocess.preprocessor}"] if unit.preprocess else []
    told.append(f"Model: {unit.model}, Weight: {unit.scale:g}")
    if (unit.start, unit.end) != (0, 1):
        told.append(f"Guidance Start: {unit.start:g}, Guidance End: {unit.end:g}")
    if unit.request.guess_mode:
        told.append("Control Mode: ControlNet is more important")
    if unit.request.block_weights:
        told.append(f"Block Weights: {' '.join(f'{weight:g}' for weight in unit.request.block_weights)}")
    if unit.request.control_type:
        told.append(f"Union Control Type: {unit.request.control_type}")
    return ", ".join(told)


def _text(value: str) -> str:
    """A JSON value as those tools read it: in quotes where it has a comma, a colon or a line's end."""
    text = value[1:-1] if re.fullmatch(r'"[^"\\]*"', value) else value
    return json.dumps(text) if re.search(r"[,:\n]", text) else text


def control_picture(plan: Plan, index: int) -> Array:
    """The unit's picture at the size of the generation, resized as diffusers' pipelines do (Lanczos).

    Raises:
        InvalidArgument: it isn't a picture.
    """
    return fit(decode(plan.controls[index].request.image, f"controls[{index}].image"), plan)


def fit(pixels: Array, plan: Plan) -> Array:
    """uint8 [height, width, 3] resized to the generation's size, as diffusers' pipelines do it (Lanczos)."""
    if pixels.shape[:2] == (plan.height, plan.width):
        return pixels
    resized = Image.fromarray(pixels).resize((plan.width, plan.height), Image.Resampling.LANCZOS)
    return np.asarray(resized)
