"""A ControlNet's residuals, each block's as soon as the block is done.

diffusers' ControlNetModel runs all blocks first and applies its zero-convolutions and the scales after the last. Here
hooks on the blocks do the same arithmetic at once, and the model's own repeat of it is skipped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from imagemesh_services.controlnet.backend import Emit, Part
from imagemesh_services.torch_support import to_numpy


class Produced(Exception):
    """All residuals are out: what the forward would still do is known."""


@contextmanager
def producing(net: Any, scales: Sequence[Any], emit: Emit) -> Iterator[None]:
    """Around a forward of ``net``, which ends in ``Produced``: emit the residuals, multiplied by ``scales``."""
    blocks = zip(net.controlnet_down_blocks, scales[:-1], strict=True)

    def finish(zero_convolution: Any, scale: Any, states: torch.Tensor) -> Any:
        made = zero_convolution(states) * scale
        return to_numpy(torch.mean(made, dim=(2, 3), keepdim=True) if net.config.global_pool_conditions else made)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        emit(Part([finish(*next(blocks), kwargs["hidden_states"])]))

    def after(module: Any, args: Any, output: Any) -> None:
        emit(Part([finish(*next(blocks), states) for states in output[1]]))

    def middle(module: Any, args: Any, output: Any) -> None:
        emit(Part([], finish(net.controlnet_mid_block, scales[-1], output)))
        raise Produced

    hooks = [net.down_blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in net.down_blocks]
    hooks.append(net.mid_block.register_forward_hook(middle))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
