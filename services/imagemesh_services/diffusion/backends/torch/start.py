"""How a run begins: from noise, from a picture, or from a picture of which a part is redrawn.

diffusers' modular blocks do what they can; where they read a latent's channels as a sign of what a tensor is (4 means
latents, anything else a picture), its classic pipelines' order of draws is followed here: first the picture's latents
from their distribution, then the noise, then, with a mask, the masked picture's latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLImg2ImgSetTimestepsStep,
    StableDiffusionXLPrepareLatentsStep,
    StableDiffusionXLSetTimestepsStep,
)
from diffusers.utils.torch_utils import randn_tensor

from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import ImageInputs
from imagemesh_services.torch_support import to_torch

_TIMESTEPS = StableDiffusionXLSetTimestepsStep()
_LATENTS = StableDiffusionXLPrepareLatentsStep()
_LATE_TIMESTEPS = StableDiffusionXLImg2ImgSetTimestepsStep()


@dataclass(frozen=True)
class LatentScale:
    """How the VAE's latents become the UNet's: (latents - shift) * factor."""

    factor: float
    shift: float

    def apply(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self.shift) * self.factor if self.shift else self.factor * latents


@dataclass(frozen=True)
class Variation:
    """Noise of other seeds, one a picture, and how far to turn to it, 0 to 1."""

    seeds: Sequence[int]
    strength: float

    def turn(self, noise: torch.Tensor) -> torch.Tensor:
        """The noise of all pictures, [n, c, h, w], turned."""
        if not self.strength:
            return noise
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        other = torch.cat([_noise(noise[:1], one) for one in generators])
        return torch.stack([slerp(a, b, self.strength) for a, b in zip(noise, other, strict=True)])


def slerp(a: torch.Tensor, b: torch.Tensor, amount: float) -> torch.Tensor:
    """From ``a`` to ``b`` along the great circle (Shoemake, 1985), so that noise keeps its length."""
    unit_a, unit_b = (one.double().flatten() / one.double().norm() for one in (a, b))
    angle = torch.acos((unit_a @ unit_b).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, amount)
    turned = torch.sin((1 - amount) * angle) * a.double() + torch.sin(amount * angle) * b.double()
    return (turned / torch.sin(angle)).to(a.dtype)


def from_noise(components: Any, state: PipelineState, variation: Variation) -> None:
    """Set the schedule and draw the noise."""
    _TIMESTEPS(components, state)
    if variation.strength:
        unet = components.unet
        size = (int(state.get(side)) // components.vae_scale_factor for side in ("height", "width"))
        like = torch.empty(1, components.num_channels_latents, *size, device=unet.device, dtype=unet.dtype)
        noise = torch.cat([_noise(like, one) for one in _generators(state)])
        state.set("latents", variation.turn(noise))
    _LATENTS(components, state)


def from_image(
    components: Any, state: PipelineState, image: ImageInputs, variation: Variation, scale: LatentScale
) -> None:
    """Set the rest of the schedule and noise the picture's latents to where it begins."""
    state.set("strength", image.strength)
    _LATE_TIMESTEPS(components, state)
    generators = _generators(state)
    clean = torch.cat([_sample(components, image.mean, image.log_variance, one, scale) for one in generators])
    noise = variation.turn(torch.cat([_noise(clean[:1], one) for one in generators]))
    scheduler = components.scheduler
    if image.mask is not None and image.strength == 1:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(clean, noise, state.get("latent_timestep"))
    state.set("latents", latents)
    if image.mask is None:
        return
    for one in generators:  # the classic pipeline draws the masked picture's latents too, which only 9 channels use
        _noise(clean[:1], one)
    mask = to_torch(image.mask, clean.device, clean.dtype)
    mask = torch.nn.functional.interpolate(mask, size=clean.shape[-2:]).repeat(len(generators), 1, 1, 1)
    for name, value in (("mask", mask), ("noise", noise), ("image_latents", clean)):
        state.set(name, value)


def _generators(state: PipelineState) -> Sequence[torch.Generator]:
    given = state.get("generator")
    return given if isinstance(given, list) else [given]


def _sample(components: Any, mean: Array, log_variance: Array, generator: torch.Generator, scale: LatentScale) -> Any:
    """A draw of one picture's latents, [1, channels, h, w], as the UNet has them."""
    unet = components.unet
    moments = torch.cat([to_torch(part, unet.device, unet.dtype) for part in (mean, log_variance)], dim=1)
    return scale.apply(DiagonalGaussianDistribution(moments).sample(generator))


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn: torch.Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return drawn
