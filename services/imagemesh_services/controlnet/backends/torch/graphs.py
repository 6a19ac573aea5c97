"""ControlNets and T2I-Adapters run by another engine; hints, scales and sums are the torch backend's.

A graph answers all residuals of a step at once, where torch tells each block's as soon as it is there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.backend import Emit, Part
from imagemesh_services.controlnet.backends.torch.adapter import TorchAdapter
from imagemesh_services.controlnet.backends.torch.model import TorchControlModel, TorchControlNet, TorchControlRun
from imagemesh_services.graphs.engine import Graph
from imagemesh_services.graphs.torch.backend import GraphBackend
from imagemesh_services.graphs.torch.compiler import Sources, Standin, run
from imagemesh_services.graphs.torch.export import Traced
from imagemesh_services.graphs.torch.unet_inputs import added_names, examples, free_axes
from imagemesh_services.torch_support import load_module, to_numpy, to_torch

_CLASSES = (ControlNetModel.__name__, T2IAdapter.__name__)


class GraphControlRun(TorchControlRun):
    """See ``TorchControlRun``."""

    @torch.inference_mode()
    def residuals(self, sample: Array, timestep: float, emit: Emit) -> None:
        self._check(sample)
        last = slice(len(self._embeddings) - len(sample), None)
        inputs = {
            "sample": to_torch(sample, self._model.device, self._model.dtype),
            "timestep": torch.full((len(sample),), timestep),
            "encoder_hidden_states": self._embeddings[last],
            "hint": self._hint,
            **{name: one[last] for name, one in self._added.items()},
        }
        found = run(self._model.graph, inputs)
        made = [to_numpy(one * scale) for one, scale in zip(found, self._scales, strict=True)]
        emit(Part(made[:-1], made[-1]))


class GraphControlModel(TorchControlModel):
    """See ``TorchControlModel``; its part that embeds pictures, which is used once a generation, stays in torch."""

    run = GraphControlRun

    def __init__(self, model: Any, make: Callable[[Traced], Graph]) -> None:
        super().__init__(model)
        self.net = Standin(model.config, make(_traced_net(model, self.count)))


class _Adapter(Standin):
    """In the place of a T2IAdapter."""

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Of [1, channels, height, width]."""
        return run(self.graph, {"pixels": pixels})


class GraphControlNet(GraphBackend, TorchControlNet):
    """Runs folders that hold a ControlNetModel or a T2IAdapter."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {name: card for name, card in super().cards().items() if card.properties["class"] in _CLASSES}

    def load(self, name: str) -> GraphControlModel | TorchAdapter:
        folder = self.repository.folders()[name]
        cls = ControlNetModel if folder.config["_class_name"] == _CLASSES[0] else T2IAdapter
        sources = Sources.of([folder.path])
        module = load_module(cls, folder.path, torch.float32, torch.device("cpu"))
        if cls is ControlNetModel:
            return GraphControlModel(module, lambda traced: self._graph("controlnet", sources, traced))
        graph = self._graph("adapter", sources, _traced_adapter(module))
        return TorchAdapter(name, _Adapter(module.config, graph))

    def _graph(self, what: str, sources: Sources, traced: Traced) -> Graph:
        return self._compiler.compile(what, sources, lambda: traced)


class _Whole(torch.nn.Module):
    """The ControlNet, with each thing that it is told as an argument of its own."""

    def __init__(self, net: Any, added: Sequence[str]) -> None:
        super().__init__()
        self.net, self._added = net, added

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompts: torch.Tensor,
        hint: torch.Tensor,
        *rest: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        down, mid = self.net(
            sample,
            timestep,
            encoder_hidden_states=prompts,
            controlnet_cond=hint,
            added_cond_kwargs=dict(zip(self._added, rest, strict=True)) or None,
            return_dict=False,
        )
        return (*down, mid)


def _traced_net(net: Any, count: int) -> Traced:
    """For any number of rows and tokens and any size, of a hint that holds for all rows."""
    inputs = examples(net.config, 2 ** len(net.config.block_out_channels) + 1)
    added = added_names(net.config)
    conditions = {name: inputs.pop(name) for name in added}
    hint = torch.zeros(1, net.config.block_out_channels[0], *inputs["sample"].shape[2:])
    outputs = [f"residuals.{i}" for i in range(count)]
    free = {**free_axes(net.config), "hint": {2: "height", 3: "width"}}
    for name in outputs:
        sides = {} if net.config.global_pool_conditions else {2: f"{name}_height", 3: f"{name}_width"}
        free[name] = {0: "rows", **sides}
    return Traced(_Whole(net, added).eval(), {**inputs, "hint": hint, **conditions}, outputs, free, type(net).__name__)


def _traced_adapter(adapter: Any) -> Traced:
    """For pictures of any size that the adapter takes."""
    factor = adapter.config.downscale_factor
    pixels = torch.zeros(1, adapter.config.in_channels, 2 * factor, 3 * factor)
    with torch.inference_mode():
        outputs = [f"features.{i}" for i in range(len(adapter(pixels)))]
    free = {"pixels": {2: "height", 3: "width"}}
    free |= {name: {2: f"{name}_height", 3: f"{name}_width"} for name in outputs}
    return Traced(adapter, {"pixels": pixels}, outputs, free)
