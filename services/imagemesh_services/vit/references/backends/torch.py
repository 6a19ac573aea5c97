"""transformers' CLIP image encoder, for IP-Adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from imagemesh_runtime.errors import NotFinite
from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.ip_adapters import IpAdapter, find_adapters
from imagemesh_services.torch_support import (
    TorchBackend,
    load_module,
    to_numpy,
    to_torch,
)
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.references.backend import Embeds


class TorchEncoder:
    """An adapter's encoder, used as diffusers' ``encode_image`` does."""

    def __init__(self, adapter: IpAdapter, encoder: Any) -> None:
        self._adapter, self._encoder = adapter, encoder
        side = encoder.config.image_size
        self._processor = CLIPImageProcessorPil(size=side, crop_size=side)

    def preprocess(self, image: Array) -> Array:
        batch = self._processor([image], input_data_format="channels_last", return_tensors="np")
        pixels: Array = batch["pixel_values"][0].astype(np.float32, copy=False)
        return pixels

    @torch.inference_mode()
    def embed(self, pixels: Array) -> Embeds:
        rows = to_torch(pixels, self._encoder.device, self._encoder.dtype)
        if self._adapter.hidden:
            both = [self._encoder(one, output_hidden_states=True).hidden_states[-2] for one in (rows, rows * 0)]
        else:
            found = self._encoder(rows).image_embeds
            both = [found, torch.zeros_like(found)]
        if not all(torch.isfinite(one).all() for one in both):
            raise NotFinite(self._adapter.name, "embeddings of reference pictures")
        positive, negative = (to_numpy(one.float()) for one in both)
        return Embeds(positive, negative)


class TorchReferences(TorchBackend):
    """The image encoders of the repository's IP-Adapters; adapters of one encoder share it."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__(config)
        self._encoders: dict[Path, Any] = {}

    def cards(self) -> Mapping[str, ModelCard]:
        return {name: ModelCard(name) for name in find_adapters(self.repository)}

    def load(self, name: str) -> TorchEncoder:
        adapter = find_adapters(self.repository)[name]
        if adapter.encoder not in self._encoders:
            module = load_module(CLIPVisionModelWithProjection, adapter.encoder, self._dtype, self._device)
            self._encoders[adapter.encoder] = module
        return TorchEncoder(adapter, self._encoders[adapter.encoder])
