"""The seam between reference pictures and what embeds them for an IP-Adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


@dataclass(frozen=True)
class Embeds:
    """What an adapter is told: float32 [pictures, width] or [pictures, tokens, width], and the same of no picture."""

    positive: Array
    negative: Array


class ReferenceEncoder(Protocol):
    """A loaded encoder, for one adapter."""

    def preprocess(self, image: Array) -> Array:
        """uint8 [height, width, 3], RGB, to the float32 [3, h, w] that the encoder wants; called from any thread."""

    def embed(self, pixels: Array) -> Embeds:
        """Preprocessed float32 [pictures, 3, h, w], embedded; called on the lane.

        Raises:
            NotFinite: the encoder gave NaN or infinity.
        """


_ROOM = "imagemesh_services.vit.references.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchReferences", library="torch"),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeReferences", explicit=True),
}
