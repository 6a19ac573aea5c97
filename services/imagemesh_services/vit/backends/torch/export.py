"""A classifier as an ONNX graph that also gives what ``embed`` needs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_services.vit.backends.torch.model import TorchVitModel
from imagemesh_services.vit.graph import LAST, LOGITS, POOLED, STATE

_OPSET: Final = 17  # has layer normalisation as one operator; every runtime of the last years knows it
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

    It is traced: the newer exporter gives the same operators and takes thirty times as long.

    Raises:
        FailedPrecondition: the model has an operator that ONNX has not.
    """
    whole = _Everything(model).eval()
    pixels = torch.zeros(2, *model.trained)
    with model.attention_shown(True), _fixed_positions(whole, pixels), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing makes a constant is fixed here: the size
        try:
            torch.onnx.export(
                whole,
                (pixels,),
                path,
                input_names=[INPUT],
                output_names=whole.names,
                dynamic_axes={name: {0: "batch"} for name in (INPUT, *whole.names)},
                opset_version=_OPSET,
                dynamo=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            what = type(model.module).__name__
            raise FailedPrecondition(f"{what} can't be an ONNX graph: {str(error).splitlines()[0]}") from error


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
