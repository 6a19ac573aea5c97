"""The seam between the ViT service and what runs the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, Protocol

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


class Pooling(Enum):
    """Which tokens of the last hidden state, after the model's final layer norm, become a picture's vector."""

    CLS = "cls"  # the class token
    MEAN = "mean"  # the mean of the patch tokens; class, distillation and register tokens are left out


@dataclass(frozen=True)
class Wanted:
    """What ``embed`` is to give.

    Attributes:
        layers: which hidden states, 0 the embedding layer's output; all of one shape.
        attention: the attention rollout as well.
    """

    pooling: Pooling = Pooling.CLS
    layers: tuple[int, ...] = ()
    attention: bool = False


class Embedding(NamedTuple):
    """What ``embed`` gives; rows are pictures."""

    # float32 [n, width]
    vectors: Array
    # float32 [n, layers asked for, tokens, width]: the output of the embedding layer, or of a later one, before the
    # final layer norm; None unless asked for.
    hidden_states: Array | None = None
    # float32 [n, rows, columns], a patch each, not negative; None unless asked for.
    attention: Array | None = None


@dataclass(frozen=True)
class Sizes:
    """Sides in pixels that a model takes: the trained one, and multiples of ``multiple`` up to ``most`` (0: none)."""

    trained: int
    multiple: int
    most: int

    def check(self, size: int) -> int:
        """The side to use, the trained one for 0.

        Raises:
            InvalidArgument: the model can't take it.
        """
        if size in (0, self.trained):
            return self.trained
        if size % self.multiple or not self.multiple <= size <= self.most:
            others = f" or a multiple of {self.multiple} from {self.multiple} to {self.most}" if self.most else ""
            raise InvalidArgument("size", size, f"0, {self.trained}{others} for this model")
        return size


class VitModel(Protocol):
    """A loaded image classifier, a label a row of its head; most are Vision Transformers.

    Attributes:
        width: of the vectors.
        states: tokens and width of each hidden state at the trained size; empty: it gives none.
        prefix: tokens before the first patch, the class token first; 0: it has no class token.
        poolings: what ``embed`` can do, the usual one first; empty: nothing.
        rollout: whether ``embed`` can give the attention.
    """

    labels: Sequence[str]
    width: int
    states: Sequence[tuple[int, int]]
    prefix: int
    poolings: Sequence[Pooling]
    rollout: bool
    sizes: Sizes

    def preprocess(self, image: Array, size: int = 0) -> Array:
        """uint8 [height, width, 3], RGB, of any size to the float32 [3, h, w] that the model wants.

        ``size`` (0: the trained one) is the side of what it makes, where that differs.
        Called from any thread, several at a time; the other methods are called on the lane.
        """

    def classify(self, pixels: Array) -> Array:
        """Preprocessed float32 [n, 3, h, w] to logits, float32 [n, labels]."""

    def embed(self, pixels: Array, wanted: Wanted) -> Embedding:
        """Preprocessed float32 [n, 3, h, w] to vectors, and what else is wanted."""


_ROOM = "imagemesh_services.vit.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchVit", library="torch"),
    "onnxruntime": BackendEntry(f"{_ROOM}.onnxruntime:OnnxVit", library="onnxruntime"),
    "openvino": BackendEntry(f"{_ROOM}.openvino:OpenVinoVit", library="openvino"),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeVit", explicit=True),
}
