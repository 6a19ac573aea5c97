"""Small pictures of a generation under way, from its latents."""

import io

import numpy as np
from PIL import Image

from imagemesh.v1 import tensor_pb2, vae_service_pb2
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.tensors import FLOATS, Array, from_proto

# Pixels of the longer side.
SIDE = 256


class Previews:
    """Turns the latents of one model into pictures; the VAE told how."""

    def __init__(self, told: vae_service_pb2.FitPreviewResponse) -> None:
        self._factors = from_proto(told.factors, "factors", dtypes=["float32"], shape=(None, 3))
        self._bias = from_proto(told.bias, "bias", dtypes=["float32"], shape=(3,))

    @classmethod
    async def of(cls, mesh: Mesh, model: str) -> "Previews":
        """Ask the VAE.

        Raises:
            MeshError: it doesn't answer.
        """
        return cls(await mesh.vae.unary(mesh.decode.FitPreview, vae_service_pb2.FitPreviewRequest(model=model)))

    def jpegs(self, latents: tensor_pb2.Tensor, width: int, height: int) -> list[bytes]:
        """A JPEG of each of [pictures, channels, h, w], in the proportions of the picture's size."""
        rows = from_proto(latents, "preview", dtypes=FLOATS, shape=(None, len(self._factors), None, None))
        colours = np.einsum("nchw,ck->nhwk", rows.astype(np.float32), self._factors) + self._bias
        pixels = ((np.nan_to_num(colours).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
        shrink = min(1.0, SIDE / max(width, height))
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        return [_jpeg(one, size) for one in pixels]


def _jpeg(pixels: Array, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, format="JPEG", quality=80)
    return file.getvalue()
