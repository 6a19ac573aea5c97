"""The seam between the text encoder service and what runs the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


@dataclass(frozen=True)
class Tokens:
    """A prompt cut into windows, each with its start, end and padding tokens."""

    # int64 [windows, window]; an empty prompt is one window.
    windows: Array
    # Tokens of the prompt itself.
    count: int


class TextModel(Protocol):
    """A loaded text encoder."""

    layers: int

    def tokenize(self, text: str) -> Tokens:
        """Called from any thread, several at a time; ``encode`` is called on the lane."""

    def encode(self, tokens: Array, clip_skip: int) -> Array:
        """float [windows, window, width]: the hidden states, ``clip_skip`` layers before the last, normed."""


_ROOM = "imagemesh_services.text_encoder.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchTextEncoder", library="torch"),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeTextEncoder", explicit=True),
}
