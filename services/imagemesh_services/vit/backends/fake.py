"""A ViT to be worked out by hand.

Preprocessing averages a picture to one pixel c, of red, green and blue from 0 to 1, which are also the logits of the
labels "red", "green" and "blue". There are two tokens, class and patch, three wide. The embedding layer gives
[0, c], the only layer turns that into [c, 2c], and the final norm does nothing: so CLS pooling answers c, mean
pooling 2c. An all-red picture has the logits [1, 0, 0] and the hidden states [[[0, 0, 0], [1, 0, 0]], [[1, 0, 0],
[2, 0, 0]]].
"""

from collections.abc import Mapping

import numpy as np

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.backend import Embedding, Pooling
from imagemesh_services.vit.config import VitConfig


class FakeVitModel:
    """See the module."""

    labels = ("red", "green", "blue")
    layers, tokens, width = 1, 2, 3

    def preprocess(self, image: Array) -> Array:
        colour: Array = image.mean(axis=(0, 1)) / 255
        return colour.astype(np.float32)[:, None, None]

    def classify(self, pixels: Array) -> Array:
        return pixels[:, :, 0, 0]

    def embed(self, pixels: Array, pooling: Pooling, hidden_states: bool) -> Embedding:
        colours = pixels[:, :, 0, 0]
        vectors = colours if pooling is Pooling.CLS else 2 * colours
        if not hidden_states:
            return Embedding(vectors, None)
        embedded = np.stack([np.zeros_like(colours), colours], axis=1)
        last = np.stack([colours, 2 * colours], axis=1)
        return Embedding(vectors, np.stack([embedded, last], axis=1))


class FakeVit:
    """Has one model, "fake"."""

    name, device, dtype = "fake", "cpu", "float32"

    def __init__(self, config: VitConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {"fake": ModelCard("fake", {"labels": "3", "width": "3"})}

    def load(self, name: str) -> FakeVitModel:
        return FakeVitModel()
