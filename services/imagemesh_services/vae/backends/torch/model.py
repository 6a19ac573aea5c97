"""diffusers' AutoencoderKL and AutoencoderKLQwenImage in torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.image_processor import VaeImageProcessor

from imagemesh_runtime.errors import NotFinite
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.torch_support import (
    TorchBackend,
    load_module,
    to_numpy,
    to_torch,
)
from imagemesh_services.vae.backend import MemoryOptions


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
            pixels = self._finite(self._decoded(scaled), "pixels")
        images = self._processor.postprocess(pixels.float(), output_type="np")
        array: Array = (images * 255).round().astype("uint8")
        return array

    @torch.inference_mode()
    def encode(self, images: Array, memory: MemoryOptions) -> tuple[Array, Array]:
        pixels = to_torch(images, self._vae.device).permute(0, 3, 1, 2).to(self._vae.dtype)
        if images.dtype == np.uint8:
            pixels = pixels / 127.5 - 1
        with self._spending(memory):
            moments = self._moments(pixels)
        mean, log_variance = (self._finite(part.float(), "latents") for part in moments)
        return to_numpy(mean), to_numpy(log_variance)

    def _decoded(self, scaled: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._vae.decode(scaled / self.scaling_factor + self.shift_factor).sample
        return pixels

    def _moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self._vae.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

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


class TorchFrameVaeModel(TorchVaeModel):
    """An AutoencoderKLQwenImage: one of videos, of which a picture is the only frame.

    Its latents are scaled a channel, which two numbers can't say: encoding answers the distribution of scaled latents.
    """

    def __init__(self, name: str, vae: Any) -> None:
        self._name = name
        self._vae = vae
        self.channels = vae.config.z_dim
        self.scale_factor = 2 ** len(vae.config.temperal_downsample)
        self.scaling_factor, self.shift_factor = 1.0, 0.0
        self._processor = VaeImageProcessor(vae_scale_factor=self.scale_factor)
        shape = (1, self.channels, 1, 1)
        self._centre = torch.tensor(vae.config.latents_mean, device=vae.device, dtype=vae.dtype).view(shape)
        self._spread = torch.tensor(vae.config.latents_std, device=vae.device, dtype=vae.dtype).view(shape)

    def _decoded(self, scaled: torch.Tensor) -> torch.Tensor:
        frames = (scaled * self._spread + self._centre).unsqueeze(2)
        pixels: torch.Tensor = self._vae.decode(frames, return_dict=False)[0][:, :, 0]
        return pixels

    def _moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self._vae.encode(pixels.unsqueeze(2)).latent_dist
        mean, log_variance = posterior.mean[:, :, 0], posterior.logvar[:, :, 0]
        return (mean - self._centre) / self._spread, log_variance - 2 * self._spread.log()


# By the class that a folder names.
MODELS: Final = {
    "AutoencoderKL": (AutoencoderKL, TorchVaeModel),
    "AutoencoderKLQwenImage": (AutoencoderKLQwenImage, TorchFrameVaeModel),
}


class TorchVae(TorchBackend):
    """Runs the ``vae`` of pipeline folders."""

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), _card)

    def load(self, name: str) -> TorchVaeModel:
        folder = self.repository.folders()[name]
        # Such a VAE, SDXL's own for one, overflows in half precision.
        upcast = folder.read("vae", "config.json").get("force_upcast", True) and self._dtype == torch.float16
        dtype = torch.float32 if upcast else self._dtype
        cls, made = MODELS[folder.config["vae"][1]]
        return made(name, load_module(cls, folder.path / "vae", dtype, self._device))


def _card(folder: ModelFolder) -> ModelCard | None:
    if not folder.has("vae") or folder.config["vae"][1] not in MODELS:
        return None
    return ModelCard(folder.name, {"class": folder.config["vae"][1]})
