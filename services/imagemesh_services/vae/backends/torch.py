"""diffusers' AutoencoderKL in torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from imagemesh_runtime.errors import NotFinite
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.repository import open_repository
from imagemesh_services.torch_support import load_module, pick_device, pick_dtype, set_threads, to_numpy, to_torch
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.config import VaeConfig


class TorchVaeModel:
    """An AutoencoderKL with the processor of diffusers' pipelines around it."""

    def __init__(self, name: str, vae: Any) -> None:
        self._name = name
        self._vae = vae
        self.channels: int = vae.config.latent_channels
        self.scale_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling_factor: float = vae.config.scaling_factor
        self.shift_factor: float = vae.config.shift_factor or 0.0
        self._processor = VaeImageProcessor(vae_scale_factor=self.scale_factor)

    @torch.inference_mode()
    def decode(self, latents: Array, memory: MemoryOptions) -> Array:
        scaled = to_torch(latents, self._vae.device, self._vae.dtype)
        with self._spending(memory):
            pixels = self._finite(self._vae.decode(scaled / self.scaling_factor + self.shift_factor).sample, "pixels")
        images = self._processor.postprocess(pixels.float(), output_type="np")
        array: Array = (images * 255).round().astype("uint8")
        return array

    @torch.inference_mode()
    def encode(self, images: Array, memory: MemoryOptions) -> tuple[Array, Array]:
        pixels = to_torch(images, self._vae.device).permute(0, 3, 1, 2).to(self._vae.dtype)
        if images.dtype == np.uint8:
            pixels = pixels / 127.5 - 1
        with self._spending(memory):
            posterior = self._vae.encode(pixels).latent_dist
        mean, log_variance = (self._finite(part.float(), "latents") for part in (posterior.mean, posterior.logvar))
        return to_numpy(mean), to_numpy(log_variance)

    def _finite(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """NaN would become a black picture, which looks like an answer."""
        if not torch.isfinite(values).all():
            raise NotFinite(self._name, what)
        return values

    @contextmanager
    def _spending(self, memory: MemoryOptions) -> Iterator[None]:
        """The options are state of the shared module; the lane runs one call at a time, so set them for the call."""
        self._vae.use_tiling, self._vae.use_slicing = memory.tiled, memory.sliced
        try:
            yield
        finally:
            self._vae.use_tiling = self._vae.use_slicing = False


class TorchVae:
    """Runs the ``vae`` of pipeline folders."""

    name = "torch"

    def __init__(self, config: VaeConfig) -> None:
        self._repository = open_repository(config)
        self._device = pick_device(config.device)
        self._dtype = pick_dtype(config.dtype)
        self.device, self.dtype = str(self._device), config.dtype
        set_threads(config.threads)

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self._repository.folders().values(), _card)

    def load(self, name: str) -> TorchVaeModel:
        folder = self._repository.folders()[name]
        # Such a VAE, SDXL's own for one, overflows in half precision.
        upcast = folder.read("vae", "config.json").get("force_upcast", True) and self._dtype == torch.float16
        dtype = torch.float32 if upcast else self._dtype
        return TorchVaeModel(name, load_module(AutoencoderKL, folder.path / "vae", dtype, self._device))


def _card(folder: ModelFolder) -> ModelCard | None:
    if not folder.has("vae") or folder.config["vae"][1] != AutoencoderKL.__name__:
        return None
    return ModelCard(folder.name, {"class": folder.config["vae"][1]})
