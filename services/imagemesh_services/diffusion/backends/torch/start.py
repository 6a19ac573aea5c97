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

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.backend import ImageInputs, Moments, SampleInputs
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


def check_image(inputs: SampleInputs, channels: int, scale_factor: int, *, inpaints: bool) -> None:
    """Whether the pictures to start from fit the model; ``inpaints``: it was made for that and wants the masked one.

    Raises:
        InvalidArgument: one has the wrong shape, is missing, or is one too many.
    """
    image = inputs.image
    masked = image.masked if image is not None else None
    if inpaints and (image is None or image.mask is None or masked is None):
        needed = "mask, masked_image_mean and masked_image_log_variance: the model is made for inpainting"
        raise InvalidArgument("inputs", "a request without them", f"a map with {needed}")
    if masked is not None and not inpaints:
        allowed = "a map without it: the model isn't made for inpainting"
        raise InvalidArgument("inputs", ["masked_image_mean"], allowed)
    if image is None:
        return
    if not isinstance(image.source, Moments) and image.source.shape[1] != channels:
        raise InvalidArgument("inputs['image_latents'].shape", list(image.source.shape), f"{channels} channels")
    wanted = (channels, inputs.height // scale_factor, inputs.width // scale_factor)
    for name, moments in (("image", image.source), ("masked_image", masked)):
        if isinstance(moments, Moments) and moments.mean.shape[1:] != wanted:
            shape = list(moments.mean.shape)
            raise InvalidArgument(f"inputs['{name}_mean'].shape", shape, str([len(moments.mean), *wanted]))


def from_noise(components: Any, state: PipelineState, variation: Variation) -> None:
    """Set the schedule and draw the noise."""
    _TIMESTEPS(components, state)
    if variation.strength:
        like = _like(components, state)
        noise = torch.cat([_noise(like, one) for one in _generators(state)])
        state.set("latents", variation.turn(noise))
    _LATENTS(components, state)


def from_image(
    components: Any, state: PipelineState, image: ImageInputs, variation: Variation, scale: LatentScale
) -> None:
    """Set the rest of the schedule and noise the picture's latents to where it begins.

    Raises:
        InvalidArgument: diffusers' scheduler can't add noise to a picture (IPNDM).
    """
    if not hasattr(components.scheduler, "add_noise"):
        allowed = "one that can begin with a picture, or a request without"
        raise InvalidArgument("scheduler", type(components.scheduler).__name__, allowed)
    state.set("strength", image.strength)
    _LATE_TIMESTEPS(components, state)
    generators = _generators(state)
    from_scratch = image.mask is not None and image.strength == 1
    # A model made for inpainting that starts from noise has no use for the whole picture, and draws nothing for it.
    clean = None if from_scratch and image.masked else _clean(components, state, image, generators, scale)
    noise = variation.turn(torch.cat([_noise(_like(components, state), one) for one in generators]))
    scheduler = components.scheduler
    if from_scratch:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(clean, noise, state.get("latent_timestep"))
    state.set("latents", latents)
    if image.mask is None:
        return
    mask = to_torch(image.mask, noise.device, noise.dtype)
    mask = torch.nn.functional.interpolate(mask, size=noise.shape[-2:]).repeat(len(generators), 1, 1, 1)
    kept = {"mask": mask, "noise": noise, "image_latents": clean}
    if image.masked is not None:
        kept["masked_image_latents"] = _draw(components, image.masked, generators, scale)
    else:
        for one in generators:  # the classic pipeline draws the masked picture's latents, used or not
            _noise(noise[:1], one)
    for name, value in kept.items():
        state.set(name, value)


def _clean(
    components: Any, state: PipelineState, image: ImageInputs, generators: Sequence[torch.Generator], scale: LatentScale
) -> Any:
    """The pictures' latents, [n, channels, h, w], as the UNet has them."""
    if isinstance(image.source, Moments):
        return _draw(components, image.source, generators, scale)
    latents = to_torch(image.source, components.unet.device, components.unet.dtype)
    size = _like(components, state).shape[-2:]
    if latents.shape[-2:] == size:
        return latents
    return torch.nn.functional.interpolate(latents, size=size, mode=image.latent_resize)


def _draw(components: Any, moments: Moments, generators: Sequence[torch.Generator], scale: LatentScale) -> torch.Tensor:
    """A draw of latents for each generator, [n, channels, h, w]."""
    rows = len(moments.mean)
    return torch.cat([_sample(components, moments, i % rows, one, scale) for i, one in enumerate(generators)])


def _like(components: Any, state: PipelineState) -> torch.Tensor:
    """An empty tensor of one picture's latents, [1, channels, h, w]."""
    unet = components.unet
    size = (int(state.get(side)) // components.vae_scale_factor for side in ("height", "width"))
    return torch.empty(1, components.num_channels_latents, *size, device=unet.device, dtype=unet.dtype)


def _generators(state: PipelineState) -> Sequence[torch.Generator]:
    given = state.get("generator")
    return given if isinstance(given, list) else [given]


def _sample(components: Any, moments: Moments, row: int, generator: torch.Generator, scale: LatentScale) -> Any:
    """A draw of one picture's latents, [1, channels, h, w], as the UNet has them."""
    unet = components.unet
    parts = (moments.mean[row : row + 1], moments.log_variance[row : row + 1])
    both = torch.cat([to_torch(part, unet.device, unet.dtype) for part in parts], dim=1)
    return scale.apply(DiagonalGaussianDistribution(both).sample(generator))


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn: torch.Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return drawn
