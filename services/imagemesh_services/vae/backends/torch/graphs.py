"""AutoencoderKL, its encoder and decoder run by another engine; the library does the rest: scales, tiles, slices."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL

from imagemesh_runtime.registry import ModelCard
from imagemesh_services.graphs.torch.backend import GraphBackend
from imagemesh_services.graphs.torch.compiler import Sources, Standin, run
from imagemesh_services.graphs.torch.export import Traced
from imagemesh_services.torch_support import load_module
from imagemesh_services.vae.backends.torch.model import TorchVae, TorchVaeModel


class GraphVae(GraphBackend, TorchVae):
    """Runs the ``vae`` of pipeline folders where that is an AutoencoderKL."""

    def cards(self) -> Mapping[str, ModelCard]:
        cards = super().cards()
        return {name: card for name, card in cards.items() if card.properties["class"] == AutoencoderKL.__name__}

    def load(self, name: str) -> TorchVaeModel:
        path = self.repository.folders()[name].path / "vae"
        sources = Sources.of([path])
        vae = load_module(AutoencoderKL, path, torch.float32, torch.device("cpu"))
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        # Sides of 2 latents and of 3, and 2 rows: whatever tracing would make of 1.
        latents = torch.zeros(2, vae.config.latent_channels, 2, 3)
        pixels = torch.zeros(2, vae.config.in_channels, 2 * scale, 3 * scale)
        for part, example in (("encoder", pixels), ("decoder", latents)):
            setattr(vae, part, self._graph(sources, part, getattr(vae, part), example))
        return TorchVaeModel(name, vae)

    def _graph(self, sources: Sources, part: str, module: Any, example: torch.Tensor) -> Standin:
        free = {"input": {0: "rows", 2: "height", 3: "width"}, "output": {0: "rows", 2: "out_height", 3: "out_width"}}
        traced = Traced(module, {"input": example}, ["output"], free, type(module).__name__)
        return _Part(None, self._compiler.compile(f"vae {part}", sources, lambda: traced))


class _Part(Standin):
    """An encoder or decoder."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Latents or pixels, [n, channels, h, w] each."""
        return run(self.graph, {"input": values})[0]
