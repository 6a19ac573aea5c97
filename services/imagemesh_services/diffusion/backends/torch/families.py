"""The families of UNets: what each wants to know besides the prompt's embeddings.

Stable Diffusion XL's is micro-conditioning (Podell et al., "SDXL", 2023): a summary of the prompt, and numbers that say
of what size and crop the picture is to look (the base model) or how it is to please (the refiner).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.torch_support import to_torch

# The scores that the refiner was told were asked for and to be avoided: diffusers' defaults.
AESTHETIC_SCORES: Final = {"prompt_embeds": 6.0, "negative_prompt_embeds": 2.5}


@dataclass(frozen=True)
class Family:
    """A kind of UNet.

    Attributes:
        addition: the UNet's ``addition_embed_type``.
        conditioning: what the text encoder must have told, each of a negative prompt too where there is guidance.
    """

    name: str
    addition: str | None
    conditioning: tuple[str, ...]


FAMILIES: Final = (
    Family("sd", None, ("prompt_embeds",)),
    Family("sd", "text", ("prompt_embeds",)),  # the UNet sums up the prompt's embeddings by itself
    Family("sdxl", "text_time", ("prompt_embeds", "pooled_prompt_embeds")),
)


def family_of(unet: Mapping[str, Any]) -> Family | None:
    """The family of a UNet by its configuration; None: it is of none of these."""
    if any(unet.get(name) is not None for name in ("class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type")):
        return None
    return next((one for one in FAMILIES if one.addition == unet.get("addition_embed_type")), None)


def masks_prompts(unet: Any) -> bool:
    """Whether prompts may be padded to the length of others: every look at them heeds ``encoder_attention_mask``.

    Not so where the UNet sums the prompt up by itself, or looks at it in place of the picture.
    """
    config = unet.config
    alone = config.only_cross_attention
    looks_only = any(alone) if isinstance(alone, list | tuple) else alone
    return config.addition_embed_type != "text" and not looks_only and not config.mid_block_only_cross_attention


def added_conditions(family: Family, inputs: SampleInputs, unet: Any, prompt: str) -> dict[str, torch.Tensor]:
    """What the UNet takes as ``added_cond_kwargs`` with the embeddings called ``prompt``, a row a picture.

    Raises:
        InvalidArgument: the summary of the prompt isn't of the model's width.
    """
    if family.addition != "text_time":
        return {}
    name = prompt.replace("prompt_embeds", "pooled_prompt_embeds")
    pooled = to_torch(inputs.conditioning[name], unet.device, unet.dtype)
    each = unet.config.addition_time_embed_dim
    numbers = (unet.config.projection_class_embeddings_input_dim - pooled.shape[-1]) / each
    if numbers not in (5, 6):
        width = unet.config.projection_class_embeddings_input_dim
        allowed = f"of width {width - 6 * each} (base) or {width - 5 * each} (refiner)"
        raise InvalidArgument(f"conditioning[{name!r}]", f"width {pooled.shape[-1]}", allowed)
    size = (inputs.height, inputs.width)
    last = size if numbers == 6 else (AESTHETIC_SCORES[prompt],)
    times = torch.tensor([[*size, 0, 0, *last]], dtype=unet.dtype, device=unet.device)
    count = len(inputs.seeds)
    return {"text_embeds": pooled.repeat(count, 1), "time_ids": times.repeat(count, 1)}
