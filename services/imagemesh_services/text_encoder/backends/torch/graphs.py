"""CLIP text encoders run by another engine; tokenizers and textual inversions are the torch backend's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from imagemesh_runtime.registry import ModelCard
from imagemesh_services.graphs.engine import Graph
from imagemesh_services.graphs.torch.backend import GraphBackend
from imagemesh_services.graphs.torch.compiler import Sources, Standin, run
from imagemesh_services.graphs.torch.export import Traced
from imagemesh_services.text_encoder.backends.torch.model import Clip, TorchTextEncoder

_LAST, _POOLED, _STATE = "last_hidden_state", "text_embeds", "hidden_states."


class GraphTextEncoder(GraphBackend, TorchTextEncoder):
    """Runs the ``text_encoder`` of pipeline folders where that is CLIP's."""

    def cards(self) -> Mapping[str, ModelCard]:
        folders = self.repository.folders()
        return {name: card for name, card in super().cards().items() if not folders[name].has("transformer")}

    def _seen(self, paths: Sequence[Path]) -> Sources:
        return Sources.of(paths)

    def _prepare(self, clip: Clip, part: str, seen: Sources) -> None:
        def stand_in(model: Any) -> _Text:
            traced = _traced(model, clip.window)
            graph = self._compiler.compile(part.replace("_", " "), seen, lambda: traced)
            return _Text(model, graph, traced.outputs)

        clip.hand_over(stand_in)


class _Text(Standin):
    """In the place of a CLIPTextModel, with or without a projection."""

    def __init__(self, model: Any, graph: Graph, outputs: Sequence[str]) -> None:
        super().__init__(model.config, graph)
        self._outputs = outputs
        # It is asked for alone where layers are left out.
        self.final_layer_norm = getattr(model, "text_model", model).final_layer_norm

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, output_hidden_states: bool) -> Any:
        """As the library's, of int64 [n, tokens]; hidden states are there whether asked for or not."""
        masks = {} if attention_mask is None else {"mask": attention_mask}
        found = dict(zip(self._outputs, run(self.graph, {"ids": ids, **masks}), strict=True))
        states = [one for name, one in found.items() if name.startswith(_STATE)]
        others = {name: one for name, one in found.items() if not name.startswith(_STATE)}
        return SimpleNamespace(hidden_states=states, **others)


class _Everything(torch.nn.Module):
    """The model, answering a tuple of what ``names`` says."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        pooled = [_POOLED] if hasattr(model, "text_projection") else []
        self.names = [_LAST, *pooled, *(f"{_STATE}{i}" for i in range(model.config.num_hidden_layers + 1))]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        found = self.model(ids, attention_mask=mask, output_hidden_states=True)
        pooled = [found.text_embeds] if _POOLED in self.names else []
        return (found.last_hidden_state, *pooled, *found.hidden_states)


def _traced(model: Any, window: int) -> Traced:
    """For any number of windows; a mask is an input only of models that ask for one."""
    whole = _Everything(model).eval()
    ids = torch.full((2, window), model.config.eos_token_id)
    inputs = {"ids": ids}
    if getattr(model.config, "use_attention_mask", False):
        inputs["mask"] = torch.ones_like(ids)
    free = {name: {0: "rows"} for name in (*inputs, *whole.names)}
    return Traced(whole, inputs, whole.names, free, type(model).__name__)
