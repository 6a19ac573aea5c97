"""A VAE to be worked out by hand.

Decoding repeats each latent 8 x 8 times and maps -1..1 of the first three of its four channels to 0..255; encoding
averages 8 x 8 pixels back, the fourth channel 0, the log-variance 0. The scaling factor is 0.5.
"""

from collections.abc import Mapping

import numpy as np

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.config import VaeConfig


class FakeVaeModel:
    """See the module."""

    channels, scale_factor, scaling_factor, shift_factor = 4, 8, 0.5, 0.0

    def decode(self, latents: Array, memory: MemoryOptions) -> Array:
        colours = (latents[:, :3].astype(np.float32) / self.scaling_factor / 2 + 0.5).clip(0, 1)
        pixels = np.round(colours * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return pixels.repeat(self.scale_factor, axis=1).repeat(self.scale_factor, axis=2)

    def encode(self, images: Array, memory: MemoryOptions) -> tuple[Array, Array]:
        count, height, width, _ = images.shape
        side = self.scale_factor
        blocks = images.reshape(count, height // side, side, width // side, side, 3).mean(axis=(2, 4))
        colours = (blocks / 127.5 - 1 if images.dtype == np.uint8 else blocks).transpose(0, 3, 1, 2)
        mean = np.concatenate([colours, np.zeros_like(colours[:, :1])], axis=1).astype(np.float32)
        return mean, np.zeros_like(mean)


class FakeVae:
    """Has one model, "fake"."""

    name, device, dtype = "fake", "cpu", "float32"
    repository = None

    def __init__(self, config: VaeConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {"fake": ModelCard("fake")}

    def load(self, name: str) -> FakeVaeModel:
        return FakeVaeModel()
