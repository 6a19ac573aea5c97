"""A ControlNet to be worked out by hand.

Its one skip residual is zero everywhere, of the rows' shape; its middle residual is scale x the picture's mean
brightness (0 to 1) everywhere, [rows, 1, 1, 1], times the second of the block weights. Asked as a T2I-Adapter it has
one feature of one cell, that brightness.
"""

from collections.abc import Mapping

import numpy as np

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.backend import ControlInputs, Emit, Part
from imagemesh_services.controlnet.config import ControlNetConfig


class FakeControlRun:
    """See the module."""

    def __init__(self, inputs: ControlInputs) -> None:
        weight = inputs.block_weights[-1] if inputs.block_weights else 1.0
        self._brightness = float(inputs.image.mean() / 255 * inputs.scale * weight)

    def tell(self, embeddings: Array, added: Mapping[str, Array]) -> None:
        """The prompts are nothing to it."""

    def residuals(self, sample: Array, timestep: float, emit: Emit) -> None:
        mid = np.full((len(sample), 1, 1, 1), self._brightness, dtype=np.float32)
        emit(Part([np.zeros_like(sample)], mid))


class FakeControlModel:
    """See the module."""

    prompt_rows_only, count, control_types = False, 2, 0

    def start(self, inputs: ControlInputs) -> FakeControlRun:
        return FakeControlRun(inputs)

    def trial(self, image: Array) -> tuple[ControlInputs, Array]:
        rows = np.zeros((2, 4, image.shape[0] // 8, image.shape[1] // 8), np.float32)
        return ControlInputs(image, np.zeros((2, 1, 4), np.float32), 1.0), rows

    def plus(self, one: Array, other: Array) -> Array:
        result: Array = one + other
        return result

    def features(self, image: Array) -> list[Array]:
        return [np.full((1, 1, 1, 1), image.mean() / 255, np.float32)]


class FakeControlNet:
    """Has one model, "fake"."""

    name, device, dtype = "fake", "cpu", "float32"
    repository = None

    def __init__(self, config: ControlNetConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {"fake": ModelCard("fake")}

    def load(self, name: str) -> FakeControlModel:
        return FakeControlModel()
