"""What the blocks of a flow-matching family are given to begin with besides the prompt: a picture, or chosen noise.

They draw the noise themselves, after the picture's latents, as their classic pipelines do.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.modular_pipelines import PipelineState

from imagemesh_services.diffusion.backend import ImageInputs, Moments, SampleInputs
from imagemesh_services.diffusion.backends.torch.start import slerp
from imagemesh_services.torch_support import to_torch


def picture(components: SimpleNamespace, inputs: SampleInputs, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """The latents to start from, a row a picture, and how far from them; nothing where noise is all there is."""
    image = inputs.image
    if image is None:
        return {}
    like = components.transformer
    if isinstance(image.source, Moments):
        latents = _drawn(image.source, generators, components)
    else:
        latents = _resized(to_torch(image.source, like.device, like.dtype), image, inputs, components.vae_scale_factor)
    return {"image_latents": latents, "strength": image.strength}


def varied_noise(
    blocks: Sequence[Any],
    components: SimpleNamespace,
    values: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    inputs: SampleInputs,
) -> dict[str, Any]:
    """The noise that ``blocks`` draw, turned towards that of the variation's seeds; nothing without a variation."""
    if not inputs.variation_strength:
        return {}
    others = [torch.Generator("cpu").manual_seed(seed) for seed in inputs.variation_seeds]
    own, other = (_noise(blocks, components, values, given) for given in (generators, others))
    rows = [slerp(a, b, inputs.variation_strength) for a, b in zip(own, other, strict=True)]
    return {"latents": torch.stack(rows)}


def one_or_all(generators: Sequence[torch.Generator]) -> Any:
    """As diffusers takes them."""
    return list(generators) if len(generators) > 1 else generators[0]


def _noise(
    blocks: Sequence[Any], components: SimpleNamespace, values: Mapping[str, Any], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    state = PipelineState()
    for name, value in {**values, "generator": one_or_all(generators)}.items():
        state.set(name, value)
    for block in blocks:
        block(components, state)
    noise: torch.Tensor = state.get("latents")
    return noise


def _drawn(moments: Moments, generators: Sequence[torch.Generator], components: SimpleNamespace) -> torch.Tensor:
    like, rows = components.transformer, len(moments.mean)
    both = torch.cat([to_torch(one, like.device, like.dtype) for one in (moments.mean, moments.log_variance)], dim=1)
    drawn = [
        DiagonalGaussianDistribution(both[i % rows : i % rows + 1]).sample(one) for i, one in enumerate(generators)
    ]
    scaled: torch.Tensor = components.latent_scale.apply(torch.cat(drawn))
    return scaled


def _resized(latents: torch.Tensor, image: ImageInputs, inputs: SampleInputs, scale: int) -> torch.Tensor:
    size = (inputs.height // scale, inputs.width // scale)
    if latents.shape[-2:] == size:
        return latents
    return torch.nn.functional.interpolate(latents, size=size, mode=image.latent_resize)
