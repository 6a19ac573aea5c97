"""The seam between the text encoder service and what runs the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array
from imagemesh_services.text_encoder.attention import Section


@dataclass(frozen=True)
class Tokens:
    """A prompt cut into windows, each with its start, end and padding tokens."""

    # int64 [windows, window]; an empty prompt is one window. Of a model with two encoders, one's ids after the other's.
    windows: Array
    # Tokens of the prompt itself.
    count: int
    # float32, a weight a token of ``windows``; None: all are 1.
    weights: Array | None = None


@dataclass(frozen=True)
class Encoded:
    """What windows became, a row a window."""

    # float [windows, tokens, width]
    embeds: Array
    # float [windows, pooled width]; None: the family has none.
    pooled: Array | None = None


class TextModel(Protocol):
    """A loaded text encoder, or two whose embeddings lie side by side."""

    layers: int
    # Whether a negative prompt leaves out layers too, and whether an empty one is zeros instead of an embedding.
    skips_negative: bool
    zeroes_empty_negative: bool
    # Models whose fingerprints are equal give equal embeddings.
    fingerprint: str
    # Of the embeddings that lie side by side, one an encoder, each weighed by itself; none: prompts are taken as is.
    widths: Sequence[int]
    # Words that its folder holds but that it can't have, and why not.
    unusable: Mapping[str, str]

    def tokenize(self, text: str) -> Tokens:
        """The text as it stands; called from any thread, several at a time; ``encode`` is called on the lane."""

    def tokenize_weighted(self, sections: Sequence[Section]) -> Tokens:
        """Likewise, with weights; every section begins a window. Not called where there are no ``widths``."""

    def encode(self, tokens: Array, clip_skip: int) -> Encoded:
        """The hidden states, ``clip_skip`` layers before the one that the family takes."""


@runtime_checkable
class PromptModel(Protocol):
    """Loaded text encoders of a family that reads each prompt whole, not in windows."""

    layers: int
    # Whether the family reads a negative prompt at all.
    negative: bool

    def count(self, field: str, text: str) -> int:
        """Tokens of the text itself; called from any thread, several at a time.

        Raises:
            InvalidArgument: it is longer than the family reads.
        """

    def encode_prompts(self, texts: Sequence[str], clip_skip: int) -> Sequence[Mapping[str, Array]]:
        """Each text's tensors by diffusers' names, one row each; called on the lane.

        "prompt_embeds" is float [1, tokens, width], "pooled_prompt_embeds" float [1, width], "prompt_embeds_mask"
        int64 [1, tokens].
        """


_ROOM = "imagemesh_services.text_encoder.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchTextEncoder", library="torch"),
    "onnxruntime": BackendEntry(
        f"{_ROOM}.onnxruntime:OnnxTextEncoder", library="onnxruntime", beside=("torch", "onnx")
    ),
    "openvino": BackendEntry(f"{_ROOM}.openvino:OpenVinoTextEncoder", library="openvino", beside=("torch",)),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeTextEncoder", explicit=True),
}
