"""What a fine-tuning run is asked to do, and whether that can be done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from imagemesh_runtime.errors import InvalidArgument

# What learns beside the new head: nothing, the last layers, low-rank additions to all layers, or everything; and the
# learning rate that suits it where none is given. The more of what was learned before is changed, the less at a time.
RATES: Final[Mapping[str, float]] = {"head": 3e-3, "last": 5e-4, "lora": 1e-3, "all": 3e-4}
# Our names of transformers' schedules, all with a warm-up.
SCHEDULES: Final[Mapping[str, str]] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}
AUGMENTATIONS: Final = ("zoom", "flip", "colour")
PRECISIONS: Final = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """How to fine-tune.

    Attributes:
        tune: a key of ``RATES``.
        layers: how many of the last layers learn, with "last".
        rank: of what is added to each linear layer, with "lora" (https://arxiv.org/abs/2106.09685).
        batch: pictures of a forward; ``accumulate`` forwards make a step.
        lr: at its peak; None: by ``tune``.
        warmup: share of the steps in which the rate rises to that.
        smoothing: share of each label's probability that the others are to have, which small data profits from.
        patience: epochs without a better result after which to stop; 0: never.
        augment: of ``AUGMENTATIONS``, what is done to pictures that are learned from.
        checkpointing: compute layers again in the backward pass, which takes less memory and more time.
    """

    tune: str = "last"
    layers: int = 2
    rank: int = 8
    epochs: int = 20
    batch: int = 32
    accumulate: int = 1
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.02
    smoothing: float = 0.1
    patience: int = 0
    augment: tuple[str, ...] = AUGMENTATIONS
    precision: str = "auto"
    checkpointing: bool = False
    seed: int = 0

    @property
    def rate(self) -> float:
        """The learning rate at its peak."""
        return RATES[self.tune] if self.lr is None else self.lr

    def as_json(self) -> dict[str, Any]:
        """All that decides what comes out."""
        return {**dataclasses.asdict(self), "lr": self.rate, "augment": list(self.augment)}


def pick_precision(choice: str, device: torch.device) -> torch.dtype:
    """The element type to compute in; weights, their sums and the optimizer stay float32.

    Raises:
        InvalidArgument: the device doesn't compute in it, or would only emulate it, many times slower.
    """
    there = _precisions(device)
    if choice == "auto":
        return there[0]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[choice]
    if dtype not in there:
        names = ", ".join(str(one).removeprefix("torch.") for one in there)
        raise InvalidArgument("precision", choice, f"auto, or what {device} computes in: {names}")
    return dtype


def _precisions(device: torch.device) -> list[torch.dtype]:
    """What the device computes in, the fastest first."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return [*([torch.bfloat16] if native else []), torch.float16, torch.float32]
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return [torch.bfloat16, torch.float32]
    return [torch.float32]
