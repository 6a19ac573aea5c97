"""UNets run by another engine; schedulers, guiders, rows and checkpoints are the torch backend's.

A graph can't be hooked: it gets ControlNets' residuals as inputs, all at once, and what changes the model's layers
(some guiders, adapters) is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import ModelCard
from imagemesh_services.diffusion.backend import SampleInputs, Steering
from imagemesh_services.diffusion.backends.torch.families import masks_prompts
from imagemesh_services.diffusion.backends.torch.injection import Injection
from imagemesh_services.diffusion.backends.torch.model import TorchDiffusion, TorchDiffusionModel
from imagemesh_services.diffusion.backends.torch.rows import Misfit, StepRows, merge_residuals
from imagemesh_services.diffusion.backends.torch.run import TorchRun
from imagemesh_services.diffusion.guiders import GUIDERS
from imagemesh_services.graphs.engine import Graph
from imagemesh_services.graphs.torch.backend import GraphBackend
from imagemesh_services.graphs.torch.compiler import Sources, Standin, run
from imagemesh_services.graphs.torch.export import Traced
from imagemesh_services.graphs.torch.unet_inputs import MAP, added_names, examples, free_axes
from imagemesh_services.torch_support import building, load_module

MASK: Final = "encoder_attention_mask"


class WholeResiduals(Injection):
    """Residuals as inputs of the forward: waited for before it."""

    def __init__(
        self, unet: Any, parts: Sequence[StepRows], residuals: Sequence[Steering | None], first: int = 0
    ) -> None:
        self._standin: GraphUNet = unet
        self._parts, self._residuals, self._first = parts, residuals, first

    @contextmanager
    def into(self, rows: slice) -> Iterator[None]:
        """Around a forward of those rows of all."""
        if any(one is not None for one in self._residuals):
            self._standin.residuals = self._merged_for(slice(self._first + rows.start, self._first + rows.stop))
        try:
            yield
        finally:
            self._standin.residuals = self._standin.none

    def _merged_for(self, rows: slice) -> list[torch.Tensor]:
        takes = len(self._standin.none) - 1
        mid = merge_residuals(self._parts, self._residuals, None, self._standin)  # the first that may be late
        for one in self._residuals:
            if one is not None and len(one.down) != takes:
                raise Misfit(f"{len(one.down)} residuals for {takes} skip connections")
        down = [merge_residuals(self._parts, self._residuals, place, self._standin) for place in range(takes)]
        return [one[rows] for one in (*down, mid)]


class GraphUNet(Standin):
    """In the place of a UNet2DConditionModel.

    Attributes:
        none: residuals that change nothing, the middle one last: -0.0, a row, column and line for all.
        residuals: those of the next forward.
    """

    def __init__(self, config: Any, graph: Graph, channels: Sequence[int]) -> None:
        super().__init__(config, graph)
        self._masks = masks_prompts(self)
        self.none = [torch.full((1, count, 1, 1), -0.0) for count in channels]
        self.residuals = self.none

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """As the library's; ``timestep`` may be one for all rows."""
        inputs = {
            "sample": sample,
            "timestep": timestep.float().expand(len(sample)),
            "encoder_hidden_states": encoder_hidden_states,
            **(added_cond_kwargs or {}),
        }
        if self._masks:
            prompts = encoder_hidden_states
            inputs[MASK] = (
                prompts.new_ones(prompts.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
            )
        inputs |= {f"residuals.{i}": one for i, one in enumerate(self.residuals)}
        return (run(self.graph, inputs)[0],)


class GraphDiffusionModel(TorchDiffusionModel):
    """See ``TorchDiffusionModel``."""

    injection = WholeResiduals

    def start(self, inputs: SampleInputs) -> TorchRun:
        if inputs.guider.changes:
            names = ", ".join(one.name for one in GUIDERS.values() if not one.changes)
            allowed = f"one that leaves the layers as they are, for this backend: {names}"
            raise InvalidArgument("guider", inputs.guider.name, allowed)
        for name, given in (("references", inputs.references), ("features", inputs.features)):
            if given:
                raise InvalidArgument(name, f"{len(given)} pictures", "none: this backend takes no adapters")
        return super().start(inputs)


class GraphDiffusion(GraphBackend, TorchDiffusion):
    """Runs the ``unet`` of pipeline folders."""

    model = GraphDiffusionModel

    def cards(self) -> Mapping[str, ModelCard]:
        folders = self.repository.folders()
        return {name: card for name, card in super().cards().items() if not folders[name].has("transformer")}

    def _module(self, cls: Any, path: Path) -> GraphUNet:
        """The weights are read only where there is no graph of them yet."""
        sources = Sources.of([path])
        with building(), torch.device("meta"):
            shape = cls.from_config(cls.load_config(path))
        channels = _channels(shape)
        graph = self._compiler.compile(
            "unet", sources, lambda: _traced(load_module(cls, path, torch.float32, torch.device("cpu")), channels)
        )
        return GraphUNet(shape.config, graph, channels)


class _Whole(torch.nn.Module):
    """The UNet, with each thing that it is told as an argument of its own."""

    def __init__(self, unet: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.unet, self._names = unet, names

    def forward(self, *told: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = dict(zip(self._names, told, strict=False))
        residuals = told[len(given) :]
        given["added_cond_kwargs"] = {name: given.pop(name) for name in added_names(self.unet.config)}
        found: torch.Tensor = self.unet(
            **given,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]
        return found


def _traced(unet: Any, channels: Sequence[int]) -> Traced:
    """For any number of rows and tokens and any size.

    The example's sides are odd all the way down, so that upsampling is traced to the size of the skip connections.
    """
    inputs = examples(unet.config, 2 ** (unet.num_upsamplers + 1) + 1)
    free = {**free_axes(unet.config), "prediction": MAP}
    if masks_prompts(unet):
        inputs[MASK] = torch.ones(inputs["encoder_hidden_states"].shape[:2])
        free[MASK] = free["encoder_hidden_states"]
    names = list(inputs)
    inputs |= {f"residuals.{i}": torch.full((1, count, 1, 1), -0.0) for i, count in enumerate(channels)}
    free |= {
        f"residuals.{i}": {axis: f"residuals_{i}_{word}" for axis, word in MAP.items()} for i in range(len(channels))
    }
    return Traced(_Whole(unet, names).eval(), inputs, ["prediction"], free, type(unet).__name__)


@torch.inference_mode()
def _channels(shape: Any) -> list[int]:
    """Of residuals, the middle one's last, by a forward without weights."""
    found: list[int] = []
    mid: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found[:0] = [skip.shape[1] for skip in kwargs["res_hidden_states_tuple"]]

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in shape.up_blocks]
    hooks.append(shape.mid_block.register_forward_hook(lambda module, args, output: mid.append(output.shape[1])))
    given: dict[str, Any] = {
        name: one.to("meta") for name, one in examples(shape.config, 2 ** (shape.num_upsamplers + 1)).items()
    }
    given["added_cond_kwargs"] = {name: given.pop(name) for name in added_names(shape.config)}
    try:
        shape(**given, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found + mid
