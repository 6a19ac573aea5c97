"""Inpainting with the shipped UNet: the known part is put back, newly noised, after every step.

This is what diffusers' inpainting pipeline does for UNets without mask channels (Lugmayr et al., "RePaint", 2022,
without its resampling); that pipeline itself insists on 4 latent channels, and the shipped VAE has 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

from imagemesh_training.data import Pixels


@torch.no_grad()
def inpaint(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    pictures: list[Pixels],
    mask: NDArray[np.bool_],
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
) -> list[Pixels]:
    """Redraw the True part of `mask`, bool (64, 64) in whole 8-pixel cells, of each picture as its prompt says."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    known = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(known.shape, generator=generator)
    redraw = torch.from_numpy(mask[::8, ::8]).float()
    before, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)

    def keep_known(pipe: Any, step: int, timestep: int, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        coming = pipe.scheduler.timesteps[step + 1 :][:1]
        kept = pipe.scheduler.add_noise(known, noise, coming) if len(coming) else known
        return {"latents": redraw * state["latents"] + (1 - redraw) * kept}

    try:
        out = pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise,
            generator=generator,
            callback_on_step_end=keep_known,
            output_type="np",
        ).images
    finally:
        pipe.scheduler = before
    pasted = np.where(mask[None, ..., None], (out * 255).round(), np.stack(pictures))
    return list(pasted.astype(np.uint8))
