"""Reference pictures to be worked out by hand: embedded as their mean red, green and blue, 0 to 1; no picture as 0."""

from collections.abc import Mapping

import numpy as np

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.references.backend import Embeds


class FakeEncoder:
    """See the module."""

    def preprocess(self, image: Array) -> Array:
        colour: Array = image.mean(axis=(0, 1)) / 255
        return colour.astype(np.float32)[:, None, None]

    def embed(self, pixels: Array) -> Embeds:
        colours = pixels[:, :, 0, 0]
        return Embeds(colours, np.zeros_like(colours))


class FakeReferences:
    """Has one adapter, "fake"."""

    name, device, dtype = "fake", "cpu", "float32"
    repository = None

    def __init__(self, config: VitConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {"fake": ModelCard("fake")}

    def load(self, name: str) -> FakeEncoder:
        return FakeEncoder()
