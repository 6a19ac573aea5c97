"""A classifier as an ONNX graph that also gives what ``embed`` needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from imagemesh_services.graphs.torch.export import Traced, write_onnx
from imagemesh_services.vit.backends.torch.model import TorchVitModel
from imagemesh_services.vit.graph import LAST, LOGITS, POOLED, STATE

INPUT: Final = "pixel_values"


class _Everything(nn.Module):
    """The classifier, answering its hidden states too."""

    def __init__(self, model: TorchVitModel) -> None:
        super().__init__()
        self.classifier, self.names = model.module, [LOGITS]
        self._states = len(model.states)
        self._seen: list[Any] = []
        if model.poolings:
            pooled = [POOLED] if model.pooled else []
            self.names += [LAST, *pooled, *(f"{STATE}{i}" for i in range(self._states))]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hook = self.classifier.base_model.register_forward_hook(lambda module, given, output: self._keep(output))
        try:
            logits = self.classifier(pixels, output_hidden_states=True).logits
        finally:
            hook.remove()
        inner = self._seen.pop()
        return (logits, *(self._part(inner, name) for name in self.names[1:]))

    def _keep(self, output: Any) -> None:
        self._seen.append(output)

    def _part(self, inner: Any, name: str) -> torch.Tensor:
        part: torch.Tensor
        part = inner.hidden_states[int(name.removeprefix(STATE))] if name.startswith(STATE) else getattr(inner, name)
        return part


@torch.inference_mode()
def export_onnx(model: TorchVitModel, path: Path) -> None:
    """Write the graph, for any number of pictures of the trained size.

    Raises:
        FailedPrecondition: the model has an operator that ONNX has not.
    """
    whole = _Everything(model).eval()
    pixels = torch.zeros(2, *model.trained)
    free = {name: {0: "batch"} for name in (INPUT, *whole.names)}
    with model.attention_shown(True), _fixed_positions(whole, pixels):
        write_onnx(Traced(whole, {INPUT: pixels}, whole.names, free, type(model.module).__name__), path)


@contextmanager
def _fixed_positions(whole: _Everything, pixels: torch.Tensor) -> Iterator[None]:
    """Positions that the model interpolates in every forward are a constant within: the size is always the same."""
    embeddings: Any = getattr(whole.classifier.base_model, "embeddings", None)
    usual = getattr(embeddings, "interpolate_pos_encoding", None)
    if usual is None:
        yield
        return
    found: list[torch.Tensor] = []

    def once(*given: Any) -> torch.Tensor:
        if not found:
            found.append(usual(*given))
        return found[0]

    embeddings.interpolate_pos_encoding = once
    try:
        whole(pixels)
        yield
    finally:
        del embeddings.interpolate_pos_encoding
