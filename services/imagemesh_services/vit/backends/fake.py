"""A ViT to be worked out by hand.

Preprocessing averages a picture to one pixel c, of red, green and blue from 0 to 1, which are also the logits of the
labels "red", "green" and "blue". There are two tokens, class and patch, three wide. The embedding layer gives
[0, c], the only layer turns that into [c, 2c], and the final norm does nothing: so CLS pooling answers c, mean
pooling 2c. An all-red picture has the logits [1, 0, 0] and the hidden states [[[0, 0, 0], [1, 0, 0]], [[1, 0, 0],
[2, 0, 0]]]. All attention is on the patch. It takes no size but its own.
"""

from collections.abc import Mapping

import numpy as np

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.backend import Embedding, Pooling, Sizes, Wanted
from imagemesh_services.vit.config import VitConfig


class FakeVitModel:
    """See the module."""

    labels = ("red", "green", "blue")
    width, states, prefix = 3, ((2, 3), (2, 3)), 1
    poolings = (Pooling.CLS, Pooling.MEAN)
    rollout = True
    sizes = Sizes(trained=1, multiple=1, most=0)

    def preprocess(self, image: Array, size: int = 0) -> Array:
        colour: Array = image.mean(axis=(0, 1)) / 255
        return colour.astype(np.float32)[:, None, None]

    def classify(self, pixels: Array) -> Array:
        return pixels[:, :, 0, 0]

    def embed(self, pixels: Array, wanted: Wanted) -> Embedding:
        colours = pixels[:, :, 0, 0]
        vectors = colours if wanted.pooling is Pooling.CLS else 2 * colours
        embedded = np.stack([np.zeros_like(colours), colours], axis=1)
        last = np.stack([colours, 2 * colours], axis=1)
        states = [(embedded, last)[layer] for layer in wanted.layers]
        attention = np.ones((len(pixels), 1, 1), np.float32) if wanted.attention else None
        return Embedding(vectors, np.stack(states, axis=1) if states else None, attention)


class FakeVit:
    """Has one model, "fake"."""

    name, device, dtype = "fake", "cpu", "float32"
    repository = None

    def __init__(self, config: VitConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {"fake": ModelCard("fake", {"labels": "3", "width": "3"})}

    def load(self, name: str) -> FakeVitModel:
        return FakeVitModel()
