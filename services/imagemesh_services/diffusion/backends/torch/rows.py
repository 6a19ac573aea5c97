"""Several runs' parts of one forward, merged: the torch side of step batching."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import Residuals
from imagemesh_services.torch_support import to_torch


@dataclass(frozen=True)
class StepRows:
    """One run's part of a forward: [rows, channels, h, w], a 0-d timestep, [rows, tokens, width]."""

    sample: torch.Tensor
    timestep: torch.Tensor
    prompts: torch.Tensor
    # ``added_cond_kwargs`` of families that have such, each [rows, width].
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # Which of the run's conditions the rows are of, as many rows each; counted from the last.
    conditions: Sequence[int] = (-1,)
    # Rows for which the model is changed first.
    own: "StepRows | None" = None

    def select(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows for the run's last conditions, as many of them as the evaluation needs, those of this part."""
        if len(rows) == len(self.sample):
            return rows
        each = len(self.sample) // len(self.conditions)
        starts = [len(rows) + condition * each for condition in self.conditions]
        return torch.cat([rows[start : start + each] for start in starts])


def merge_timesteps(parts: Sequence[StepRows]) -> torch.Tensor:
    """The timesteps of a forward's rows: as float32, in which every timestep is exact; alone, as diffusers has it."""
    if len(parts) == 1:
        return parts[0].timestep
    return torch.cat([part.timestep.float().expand(len(part.sample)) for part in parts])


def merge_prompts(parts: Sequence[StepRows]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The prompts of a forward's rows, [rows, tokens, width], shorter ones padded with zeros; and where they are.

    The second is [rows, tokens], 0 at padding, as diffusers has ``encoder_attention_mask``; None: nothing is padded.
    """
    lengths = [part.prompts.shape[1] for part in parts]
    most = max(lengths)
    if min(lengths) == most:
        return torch.cat([part.prompts for part in parts]), None
    padded = [torch.nn.functional.pad(part.prompts, (0, 0, 0, most - part.prompts.shape[1])) for part in parts]
    merged = torch.cat(padded)
    mask = torch.ones(merged.shape[:2], device=merged.device, dtype=merged.dtype)
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        mask[start : start + len(part.prompts), length:] = 0
        start += len(part.prompts)
    return merged, mask


def merge_residuals(parts: Sequence[StepRows], residuals: Sequence[Residuals | None], like: Any) -> list[torch.Tensor]:
    """The rows' residuals, the middle one last, if a run has any; rows without get -0.0, which changes no float."""
    given = next((one for one in residuals if one is not None), None)
    if given is None:
        return []

    def rows(part: StepRows, mine: Array | None, shape: Array) -> torch.Tensor:
        if mine is not None:
            return part.select(to_torch(mine, like.device, like.dtype))
        return torch.full((len(part.sample), *shape.shape[1:]), -0.0, device=like.device, dtype=like.dtype)

    pairs = list(zip(parts, residuals, strict=True))
    down = [
        torch.cat([rows(part, None if one is None else one.down[i], given.down[i]) for part, one in pairs])
        for i in range(len(given.down))
    ]
    mid = torch.cat([rows(part, None if one is None else one.mid, given.mid) for part, one in pairs])
    return [*down, mid]
