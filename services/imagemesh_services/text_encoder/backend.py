"""The seam between the text encoder service and what runs the model."""

from collections.abc import Mapping
from typing import Final, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


class TextModel(Protocol):
    """A loaded text encoder."""

    layers: int

    def tokenize(self, text: str) -> Array:
        """int64 [windows, window]: the prompt cut into windows, each with its start, end and padding tokens.

        An empty prompt is one window.
        """

    def count_tokens(self, text: str) -> int:
        """Tokens of the prompt itself."""

    def encode(self, tokens: Array, clip_skip: int) -> Array:
        """float [windows, window, width]: the hidden states, ``clip_skip`` layers before the last, normed."""


_ROOM = "imagemesh_services.text_encoder.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchTextEncoder", library="torch"),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeTextEncoder", explicit=True),
}
