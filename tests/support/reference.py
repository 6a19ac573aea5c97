"""What diffusers' own pipelines draw for a request: the pictures that the mesh must equal."""

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tests.support.meant_schedulers import MEANT


@cache
def pipeline(path: Path) -> Any:
    """The folder's StableDiffusionPipeline."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler(path: Path, name: str, seeds: list[int], **more: Any) -> Any:
    """A fresh scheduler, set up as the name says, with ``more`` options."""
    base = pipeline(path).scheduler
    if not name:
        return type(base).from_config(base.config)
    class_name, meant = MEANT.get(name, (name, {}))
    options = {**meant, **more}
    if class_name == "DPMSolverSDEScheduler":
        # It ignores the request's generator; without a seed it would draw from the global one.
        options["noise_sampler_seed"] = seeds if len(seeds) > 1 else seeds[0]
    return getattr(diffusers, class_name).from_config(base.config, **options)


def draw(
    path: Path,
    prompt: str,
    *,
    scheduler_name: str = "",
    seeds: list[int],
    controlnet: Path | None = None,
    control_image: Image.Image | None = None,
    scheduler_options: dict[str, Any] | None = None,
    generator_state: torch.Tensor | None = None,
    **settings: Any,
) -> np.ndarray[Any, Any]:
    """uint8 [pictures, height, width, 3], one a seed."""
    pipe, extra = pipeline(path), {}
    if controlnet is not None:
        module = diffusers.ControlNetModel.from_pretrained(controlnet)
        pipe = diffusers.StableDiffusionControlNetPipeline(
            **pipe.components, controlnet=module, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        extra = {"image": control_image}
    before, pipe.scheduler = pipe.scheduler, scheduler(path, scheduler_name, seeds, **(scheduler_options or {}))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if generator_state is not None:
        generators[0].set_state(generator_state)
    try:
        images = pipe(
            prompt,
            num_images_per_prompt=len(seeds),
            generator=generators if len(seeds) > 1 else generators[0],
            output_type="np",
            **extra,
            **settings,
        ).images
    finally:
        pipe.scheduler = before
    drawn: np.ndarray[Any, Any] = (images * 255).round().astype("uint8")
    return drawn


def worst(ours: Any, theirs: Any) -> int:
    """The largest difference of a pixel, of 255."""
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())
