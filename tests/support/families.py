"""Pictures of the transformer families: the mesh's, and those of diffusers' own pipelines."""

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from imagemesh_client import Client

PROMPT, NEGATIVE = "a red fox on the water", "a dog"
SIDE, STEPS, GUIDANCE = 64, 5, 4.0

# diffusers' own settings for flow-matching models, by the names that the mesh takes.
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "LCM": ("FlowMatchLCMScheduler", {}),
    "Euler a": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "UniPC": ("UniPCMultistepScheduler", _FLOW),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _FLOW),
    "SA Solver": ("SASolverScheduler", _FLOW),
    "Euler Karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    # With the option flow_shift.
    "Euler, 7": ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0, "use_dynamic_shifting": False}),
    "DPM++ 2M, 7": ("DPMSolverMultistepScheduler", {**_FLOW, "flow_shift": 7.0}),
}


def a_picture() -> Image.Image:
    """64 x 64 pixels, soft and colourful."""
    numbers = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(numbers).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@cache
def pipeline(folder: Path) -> Any:
    """The folder's own pipeline."""
    lacks = {} if (folder / "tokenizer_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **(lacks if "sd3" in folder.name else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(folder: Path, seeds: list[int], scheduler: str = "", kind: str = "", **settings: Any) -> np.ndarray:
    """uint8 [pictures, height, width, 3], one a seed, of the folder's pipeline or one of another ``kind``."""
    pipe = pipeline(folder)
    if kind:
        pipe = getattr(diffusers, kind)(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
    before = pipe.scheduler
    if scheduler:
        class_name, options = SCHEDULERS[scheduler]
        pipe.scheduler = getattr(diffusers, class_name).from_config(before.config, **options)
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": SIDE, "height": SIDE}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    step, drawing = pipe.scheduler.step, generators if len(generators) > 1 else generators[0]
    if scheduler in ("Euler a", "LCM", "SA Solver"):  # the pipeline forgets to say where to draw from
        pipe.scheduler.step = lambda *given, **more: step(*given, generator=drawing, **more)
    try:
        images = pipe(
            PROMPT, num_images_per_prompt=len(seeds), generator=drawing, output_type="np", **common | settings
        ).images
    finally:
        pipe.scheduler = before
    drawn: np.ndarray = (images * 255).round().astype("uint8")
    return drawn


def made(client: Client, model: str, **options: Any) -> np.ndarray:
    """The same of the mesh."""
    options = {"steps": STEPS, "guidance": GUIDANCE, "seed": 3, "width": SIDE, "height": SIDE, **options}
    return np.stack([np.asarray(one.to_pil()) for one in client.generate(PROMPT, model=model, **options).images])
