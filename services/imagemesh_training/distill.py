"""Teach a smaller classifier to answer as a bigger one does; it needs pictures, and no labels.

The student learns the teacher's softened probabilities (Hinton et al., 2015, https://arxiv.org/abs/1503.02531) on
blends of two pictures, turned over at random, that both see alike (Beyer et al., 2022, https://arxiv.org/abs/2106.05237).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from imagemesh_training.common import set_lr


@dataclass(frozen=True)
class Plan:
    """How to distil.

    Attributes:
        layers: of the student; at the teacher's width they begin as copies of the teacher's, evenly picked.
        width: of the student's hidden states; another than the teacher's begins with random weights.
        temperature: divides the logits, so that unlikely labels count too.
    """

    layers: int
    width: int
    steps: int = 300
    batch: int = 32
    lr: float = 5e-4
    temperature: float = 2.0
    seed: int = 0


class NotPlain(ValueError):
    """The teacher is of a kind that no smaller one is made of here."""


class NotSmaller(ValueError):
    """The plan's layers or width are of no student of this teacher."""


def student_of(teacher: Any, plan: Plan) -> Any:
    """An untrained student of the teacher's own class, heads as wide as the teacher's.

    Raises:
        NotPlain: the teacher is no plain ViT.
        NotSmaller: the student isn't smaller, or its width is of no whole heads.
    """
    config = copy.deepcopy(teacher.config)
    layers, width = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not (isinstance(layers, int) and isinstance(width, int) and hasattr(config, "intermediate_size")):
        raise NotPlain(f"a {config.model_type} can't be made smaller: it is no plain Vision Transformer")
    head = width // config.num_attention_heads
    if plan.width % head or not head <= plan.width <= width or not 1 <= plan.layers <= layers:
        raise NotSmaller(f"at most {layers} layers, and a width from {head} to {width} that is a multiple of {head}")
    config.num_hidden_layers, config.hidden_size = plan.layers, plan.width
    config.num_attention_heads = plan.width // head
    config.intermediate_size = config.intermediate_size * plan.width // width
    if getattr(config, "pooler_output_size", None):
        config.pooler_output_size = plan.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        student = type(teacher)(config)
    if plan.width == width:
        _inherit(student, teacher, plan.layers, layers)
    return student


def _inherit(student: nn.Module, teacher: nn.Module, layers: int, above: int) -> None:
    """Copy the teacher's weights; of its ``above`` layers those that lie evenly."""
    picked = {i: round((i + 0.5) * above / layers - 0.5) for i in range(layers)}
    theirs = teacher.state_dict()
    with torch.no_grad():
        for name, value in student.state_dict().items():
            value.copy_(theirs[_at(name, picked)])


def _at(name: str, picked: dict[int, int]) -> str:
    """The name of a layer's weight, the layer replaced by the one it comes from."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and parts[i - 1] in ("layer", "layers"):
            return ".".join([*parts[:i], str(picked[int(part)]), *parts[i + 1 :]])
    return name


def distill(
    teacher: Any, pixels: torch.Tensor, plan: Plan, tell: Callable[[int, float], None] = lambda step, loss: None
) -> Any:
    """The trained student, in eval mode.

    Args:
        pixels: preprocessed pictures, float32 [n, 3, h, w].
        tell: is told each step and its loss.
    """
    student = student_of(teacher, plan).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=plan.lr, weight_decay=0.02)
    rng = torch.Generator().manual_seed(plan.seed)
    for step in range(plan.steps):
        set_lr(optimizer, step, plan.steps, plan.lr, warmup=min(20, plan.steps // 5 + 1))
        batch = _blend(pixels, plan.batch, rng)
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(batch).logits / plan.temperature, dim=-1)
        given = functional.log_softmax(student(batch).logits / plan.temperature, dim=-1)
        loss = functional.kl_div(given, wanted, log_target=True, reduction="batchmean") * plan.temperature**2
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        tell(step + 1, loss.item())
    return student.eval().requires_grad_(False)


def _blend(pixels: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    """``count`` pictures, half of them turned over left to right; half of them mixed with another."""
    one, two = (pixels[torch.randint(len(pixels), (count,), generator=rng)] for _ in range(2))
    turned = torch.rand(count, generator=rng) < 0.5
    one = torch.where(turned[:, None, None, None], one.flip(-1), one)
    share = torch.rand(count, generator=rng).clamp(min=0.5)
    share[torch.rand(count, generator=rng) < 0.5] = 1
    return one.lerp(two, (1 - share)[:, None, None, None])
