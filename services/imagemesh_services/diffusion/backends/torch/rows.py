"""Several runs' parts of one forward, merged: the torch side of step batching."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import Steering
from imagemesh_services.diffusion.backends.torch.adapters import NOTHING, Adapted
from imagemesh_services.torch_support import to_torch


class Misfit(RuntimeError):
    """Residuals are not as many as the model and its rows take."""


@dataclass(frozen=True)
class StepRows:
    """One run's part of a forward: [rows, channels, h, w], a 0-d timestep, [rows, tokens, width]."""

    sample: torch.Tensor
    timestep: torch.Tensor
    prompts: torch.Tensor
    # ``added_cond_kwargs`` of families that have such, and what adapters say, each with a row for each row.
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # Which of the run's conditions the rows are of, as many rows each; counted from the last.
    conditions: Sequence[int] = (-1,)
    # Rows for which the model is changed first.
    own: "StepRows | None" = None
    # The IP-Adapters that the model has for these rows, and how much each counts.
    adapted: Adapted = NOTHING

    @property
    def featured(self) -> bool:
        """Whether T2I-Adapters have a say."""
        return any(name.startswith("features.") for name in self.added)

    def select(self, rows: torch.Tensor) -> torch.Tensor:
        """Of residuals for the run's last conditions, those of this part; conditions that they don't have get -0.0."""
        each = len(self.sample) // len(self.conditions)
        if not len(rows) or len(rows) % each:
            raise Misfit(f"{len(rows)} rows of residuals for pictures of {each}")
        found = []
        for condition in self.conditions:
            start = len(rows) + condition * each
            found.append(rows[start : start + each] if start >= 0 else torch.full_like(rows[:each], -0.0))
        return torch.cat(found) if len(found) > 1 else found[0]


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


def merge_residuals(
    parts: Sequence[StepRows], residuals: Sequence[Steering | None], place: int | None, like: Any
) -> torch.Tensor:
    """The rows' residuals at a place among the skip connections, or of the middle block (None).

    At least one run has some; rows without get -0.0, which changes no float.
    """
    mine = [None if one is None else one.mid if place is None else one.down[place] for one in residuals]
    shape = next(one.shape[1:] for one in mine if one is not None)

    def rows(part: StepRows, given: Array | None) -> torch.Tensor:
        if given is not None:
            return part.select(to_torch(given, like.device, like.dtype))
        return torch.full((len(part.sample), *shape), -0.0, device=like.device, dtype=like.dtype)

    return torch.cat([rows(part, given) for part, given in zip(parts, mine, strict=True)])
