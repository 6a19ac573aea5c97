"""The seam between the ViT service and what runs the model."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Final, NamedTuple, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


class Pooling(Enum):
    """Which tokens of the last hidden state, after the model's final layer norm, become a picture's vector."""

    CLS = "cls"  # the class token
    MEAN = "mean"  # the mean of the patch tokens; class and distillation tokens are left out


class Embedding(NamedTuple):
    """What ``embed`` gives; rows are pictures."""

    # float32 [n, width]
    vectors: Array
    # float32 [n, layers + 1, tokens, width]: the output of the embedding layer, then of every layer, before the final
    # layer norm; None unless asked for.
    hidden_states: Array | None


class VitModel(Protocol):
    """A loaded Vision Transformer with a classification head, a label a row of the head."""

    labels: Sequence[str]
    layers: int
    tokens: int
    width: int

    def preprocess(self, image: Array) -> Array:
        """uint8 [height, width, 3], RGB, of any size to the float32 [3, h, w] that the model wants.

        Called from any thread, several at a time; the other methods are called on the lane.
        """

    def classify(self, pixels: Array) -> Array:
        """Preprocessed float32 [n, 3, h, w] to logits, float32 [n, labels]."""

    def embed(self, pixels: Array, pooling: Pooling, hidden_states: bool) -> Embedding:
        """Preprocessed float32 [n, 3, h, w] to vectors, and the hidden states if asked for."""


_ROOM = "imagemesh_services.vit.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchVit", library="torch"),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeVit", explicit=True),
}
