"""diffusers' T2IAdapter in torch."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_runtime.tensors import Array
from imagemesh_services.torch_support import to_numpy, to_torch


class TorchAdapter:
    """An adapter that sees pictures in colour, or in grey if it has one channel."""

    def __init__(self, name: str, adapter: Any) -> None:
        self._name, self._adapter = name, adapter

    @torch.inference_mode()
    def features(self, image: Array) -> list[Array]:
        factor: int = self._adapter.config.downscale_factor
        if any(side % factor for side in image.shape[:2]):
            raise InvalidArgument("image.shape", list(image.shape), f"sides that are multiples of {factor}")
        if self._adapter.config.in_channels == 1:
            image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
        pixels = to_torch(image.astype(np.float32) / 255, self._adapter.device, self._adapter.dtype)
        found = self._adapter(pixels.permute(2, 0, 1).unsqueeze(0))
        if not all(torch.isfinite(one).all() for one in found):
            raise NotFinite(self._name, "features of a picture")
        return [to_numpy(one) for one in found]
