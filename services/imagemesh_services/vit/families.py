"""What the architectures' outputs mean; any that transformers can classify with is served, these also embed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final


def _none(config: Any) -> int:
    return 0


@dataclass(frozen=True)
class Family:
    """How to read the hidden states of a model.

    Attributes:
        prefix: tokens before the first patch, the class token first, by the model's configuration.
        positions: position embeddings are learned for one size: ``interpolate_pos_encoding`` asks for another.
        pooled: the vector of mean pooling is ``pooler_output``, where the final norm comes after the mean.
        stride: sides of pictures are multiples of it; None: of the patch; 0: only the trained size.
        rollout: attention goes from every token to every token, so that it can be followed through the layers.
    """

    prefix: Callable[[Any], int] = _none
    positions: bool = False
    pooled: bool = False
    stride: int | None = None
    rollout: bool = False


# By ``model_type`` of config.json. Adding one is adding a row.
FAMILIES: Final[Mapping[str, Family]] = {
    "vit": Family(prefix=lambda _: 1, positions=True, rollout=True),
    # Beside the class token, a distillation token (https://arxiv.org/abs/2012.12877).
    "deit": Family(prefix=lambda _: 2, positions=True, rollout=True),
    "dinov2": Family(prefix=lambda _: 1, rollout=True),
    "dinov2_with_registers": Family(prefix=lambda config: 1 + int(config.num_register_tokens), rollout=True),
    # A picture that a window covers changes the layer's window for good: sizes would depend on what came before.
    "swin": Family(stride=0),
    "swinv2": Family(stride=0),
    "convnext": Family(pooled=True, stride=32),
    "convnextv2": Family(pooled=True, stride=32),
}
