"""ControlNets' residuals, added to a UNet while it runs: each when it is needed, and not waited for before.

The UNet adds them itself if it is given them all beforehand. Nothing of them is needed until the middle block is done,
so here hooks do the same additions: after that block, and before each up block. The bits are the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from imagemesh_services.diffusion.backend import Late, Steering
from imagemesh_services.diffusion.backends.torch.rows import Misfit, StepRows, merge_residuals


class Injection:
    """What is added to rows of one or several runs' parts.

    Args:
        residuals: a part each; read when the middle block is done, which may be ``Late``.
        first: the row that forwards count theirs from.
    """

    def __init__(
        self, unet: Any, parts: Sequence[StepRows], residuals: Sequence[Steering | None], first: int = 0
    ) -> None:
        self._unet = unet
        self._first = first
        self._parts = parts
        self._residuals = residuals
        self._takes = sum(len(block.resnets) for block in unet.up_blocks)
        self._end = 0

    @contextmanager
    def into(self, rows: slice) -> Iterator[None]:
        """Around a forward of those rows of all."""
        if not any(one is not None for one in self._residuals):
            yield
            return
        self._end = self._takes
        rows = slice(self._first + rows.start, self._first + rows.stop)

        def middle(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + self._merged(None)[rows]

        def up(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            skips = kwargs["res_hidden_states_tuple"]
            self._end -= len(skips)
            added = tuple(skip + self._merged(self._end + i)[rows] for i, skip in enumerate(skips))
            return args, {**kwargs, "res_hidden_states_tuple": added}

        hooks = [self._unet.mid_block.register_forward_hook(middle)]
        hooks += [block.register_forward_pre_hook(up, with_kwargs=True) for block in self._unet.up_blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _merged(self, place: int | None) -> torch.Tensor:
        """The residual at that place of all rows, the middle block's if None."""
        for one in self._residuals:
            if one is not None and len(one.down) != self._takes:
                raise Misfit(f"{len(one.down)} residuals for {self._takes} skip connections")
        return merge_residuals(self._parts, self._residuals, place, self._unet)


def parted(
    begun: Sequence[tuple[int, Any]], residuals: Sequence[Steering | None]
) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
    """Of parts with the places of their runs: those whose residuals are there, and those whose are late."""
    there, missing = [], []
    for one in begun:
        steering = residuals[one[0]]
        try:
            if steering is not None:
                _ = steering.mid
            there.append(one)
        except Late:
            missing.append(one)
    return there, missing
