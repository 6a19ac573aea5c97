"""The seam between the VAE service and what runs the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


@dataclass(frozen=True)
class MemoryOptions:
    """How to spend less memory: overlapping tiles, or one picture after another."""

    tiled: bool = False
    sliced: bool = False


class VaeModel(Protocol):
    """A loaded VAE. ``scale_factor`` is the pixels a latent spans in each direction."""

    channels: int
    scale_factor: int
    scaling_factor: float
    shift_factor: float

    def decode(self, latents: Array, memory: MemoryOptions) -> Array:
        """Scaled float latents [n, channels, h, w] to uint8 pictures [n, h * scale_factor, w * scale_factor, 3].

        Raises:
            NotFinite: the model gave NaN or infinity; ``encode`` likewise.
        """

    def encode(self, images: Array, memory: MemoryOptions) -> tuple[Array, Array]:
        """Pictures [n, height, width, 3] to the posterior's mean and log-variance, float32, not scaled.

        The pictures are uint8, or float32 in -1 to 1.
        """


_ROOM = "imagemesh_services.vae.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchVae", library="torch"),
    "onnxruntime": BackendEntry(f"{_ROOM}.onnxruntime:OnnxVae", library="onnxruntime", beside=("torch", "onnx")),
    "openvino": BackendEntry(f"{_ROOM}.openvino:OpenVinoVae", library="openvino", beside=("torch",)),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeVae", explicit=True),
}
