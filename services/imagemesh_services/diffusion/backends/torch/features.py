"""T2I-Adapters' features of one generation, as the UNet takes them at each evaluation."""

from collections.abc import Mapping
from typing import Any, Final

import torch

from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.features import steers
from imagemesh_services.torch_support import to_torch

_NAME: Final = "features"


class Features:
    """Added up as diffusers' MultiAdapter does; the sums are kept while the same adapters are at work."""

    def __init__(self, inputs: SampleInputs, unet: Any) -> None:
        self._given = [[to_torch(one, unet.device, unet.dtype) for one in each.tensors] for each in inputs.features]
        self._inputs = inputs
        self._places: list[int] | None = None
        self._sums: list[torch.Tensor] = []

    def rows(self, evaluation: int, evaluations: int, count: int) -> dict[str, torch.Tensor]:
        """By name, [count, channels, h, w] each; outside of all adapters' parts -0.0, which changes no float."""
        if not self._given:
            return {}
        given = enumerate(self._inputs.features)
        places = [i for i, one in given if steers(one.start, one.end, evaluation, evaluations)]
        if places != self._places:
            self._places, self._sums = places, self._added(places)
        return {f"{_NAME}.{i}": one.expand(count, -1, -1, -1) for i, one in enumerate(self._sums)}

    def _added(self, places: list[int]) -> list[torch.Tensor]:
        if not places:
            return [torch.full_like(one, -0.0) for one in self._given[0]]
        scaled = [[one * self._inputs.features[place].scale for one in self._given[place]] for place in places]
        return [torch.stack(each).sum(dim=0) if len(each) > 1 else each[0] for each in zip(*scaled, strict=True)]


def taken_out(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What is no feature, and the features in their order."""
    others = {name: rows for name, rows in given.items() if not name.startswith(f"{_NAME}.")}
    return others, [given[f"{_NAME}.{i}"] for i in range(len(given) - len(others))]
