"""Inputs to measure a UNet with: of the shapes that a request's have, and of no content."""

from typing import Any, Final

import numpy as np

from imagemesh_services.diffusion.backend import ImageInputs, Moments, SampleInputs
from imagemesh_services.diffusion.backends.torch.families import Family

_TOKENS: Final = 77  # of a prompt of ordinary length
_STEPS: Final = 20


def trial_inputs(family: Family, unet: Any, moments: tuple[int, int, int], size: tuple[int, int]) -> SampleInputs:
    """One row without guidance.

    Args:
        moments: channels, height and width of the latents.
        size: width and height of the picture, in pixels.
    """
    config = unet.config
    conditioning = {"prompt_embeds": np.zeros((1, _TOKENS, config.cross_attention_dim), np.float32)}
    if "pooled_prompt_embeds" in family.conditioning:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditioning["pooled_prompt_embeds"] = np.zeros((1, pooled), np.float32)
    image = None
    if config.in_channels != moments[0]:  # made for inpainting
        zeros = Moments(*(np.zeros((1, *moments), np.float32) for _ in range(2)))
        image = ImageInputs(zeros, 1.0, np.ones((1, 1, size[1], size[0]), np.uint8), zeros)
    return SampleInputs(conditioning, *size, _STEPS, 1.0, None, (0,), image)
