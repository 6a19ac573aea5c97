"""What UNets and their ControlNets are called with, to trace them by."""

from collections.abc import Mapping
from typing import Any, Final

import torch

# Of a batch of feature maps.
MAP: Final[Mapping[int, str]] = {0: "rows", 2: "height", 3: "width"}
_NUMBERS: Final = 6  # of Stable Diffusion XL's micro-conditioning


def examples(config: Any, side: int) -> dict[str, torch.Tensor]:
    """Two rows by the library's names: a sample of ``side`` x ``side + 2``, timesteps, prompts, other conditions."""
    inputs = {
        "sample": torch.zeros(2, config.in_channels, side, side + 2),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 5, config.cross_attention_dim),
    }
    return inputs | _added(config)


def added_names(config: Any) -> list[str]:
    """Of what the model takes as ``added_cond_kwargs``."""
    return list(_added(config))


def free_axes(config: Any) -> dict[str, Mapping[int, str]]:
    """Of these inputs the axes whose length isn't fixed."""
    # How many of the added conditions are numbers is the family member's affair.
    added: dict[str, Mapping[int, str]] = {name: {0: "rows", 1: f"{name}_width"} for name in _added(config)}
    return {"sample": MAP, "timestep": {0: "rows"}, "encoder_hidden_states": {0: "rows", 1: "tokens"}, **added}


def _added(config: Any) -> dict[str, torch.Tensor]:
    if config.addition_embed_type != "text_time":
        return {}
    pooled = config.projection_class_embeddings_input_dim - _NUMBERS * config.addition_time_embed_dim
    return {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, _NUMBERS)}
