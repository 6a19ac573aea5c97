"""What a VAE is measured by: one picture, decoded."""

from collections.abc import Callable

import numpy as np

from imagemesh_services.vae.backend import MemoryOptions, VaeModel


def trial(model: VaeModel, width: int, height: int) -> Callable[[], object]:
    """The work, of a picture of that size in pixels."""
    shape = (1, model.channels, height // model.scale_factor, width // model.scale_factor)
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return lambda: model.decode(latents, MemoryOptions())
