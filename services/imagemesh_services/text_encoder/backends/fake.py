"""A text encoder to be worked out by hand.

A window is 8 tokens of a start (1), up to 6 characters' code points, and ends (2); the embedding of token t is
[t, t, t, t] / 256 - clip_skip. So "hi" is [[1, 104, 105, 2, 2, 2, 2, 2]] / 256, four columns wide.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.text_encoder.attention import Section, literal
from imagemesh_services.text_encoder.backend import Encoded, Tokens
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.text_encoder.windows import cut

START, END, WINDOW, WIDTH = 1, 2, 8, 4


class FakeTextModel:
    """See the module."""

    layers = 3
    skips_negative = True
    zeroes_empty_negative = False
    fingerprint = "fake"
    widths = (WIDTH,)
    unusable: Mapping[str, str] = {}

    def tokenize(self, text: str) -> Tokens:
        return self.tokenize_weighted(literal(text))

    def tokenize_weighted(self, sections: Sequence[Section]) -> Tokens:
        ids = [[(ord(one), piece.weight) for piece in section for one in piece.text] for section in sections]
        return cut(ids, WINDOW, START, END, END)

    def encode(self, tokens: Array, clip_skip: int) -> Encoded:
        return Encoded(np.repeat(tokens[..., None] / 256 - clip_skip, WIDTH, axis=-1).astype(np.float32))


class FakeTextEncoder:
    """Has one model, "fake"."""

    name, device, dtype = "fake", "cpu", "float32"
    repository = None

    def __init__(self, config: TextEncoderConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {"fake": ModelCard("fake")}

    def load(self, name: str) -> FakeTextModel:
        return FakeTextModel()
