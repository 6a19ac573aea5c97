"""Prompts of families that read them whole: no windows, no padding to one another's length."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagemesh_runtime.batching import Batcher
from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_runtime.tensors import Array
from imagemesh_services.text_encoder.backend import PromptModel

_NEGATIVE = "negative_prompt"


async def encode_whole(
    batcher: Batcher[Any, Any], name: str, model: PromptModel, prompts: Mapping[str, str], clip_skip: int
) -> tuple[dict[str, Array], int]:
    """The tensors of "prompt" and perhaps "negative_prompt" by diffusers' names, and the prompt's tokens.

    Raises:
        InvalidArgument: one is longer than the family reads, or the family reads no negative prompt.
    """
    if not model.negative and prompts.get(_NEGATIVE):
        raise InvalidArgument(_NEGATIVE, prompts[_NEGATIVE], f"empty: {name} reads none")
    wanted = {field: text for field, text in prompts.items() if model.negative or field != _NEGATIVE}
    with batcher.reserve():
        counts = await asyncio.to_thread(lambda: [model.count(field, text) for field, text in wanted.items()])
    # The library skips layers for the prompt alone.
    skips = [clip_skip if field != _NEGATIVE else 0 for field in wanted]
    if len(set(skips)) == 1:
        found = await batcher.submit_all((name, skips[0]), list(wanted.values()), [1] * len(wanted))
    else:
        pairs = zip(skips, wanted.values(), strict=True)
        found = await asyncio.gather(*(batcher.submit((name, skip), text) for skip, text in pairs))
    conditioning: dict[str, Array] = {}
    for field, tensors in zip(wanted, found, strict=True):
        sign = "negative_" if field == _NEGATIVE else ""
        conditioning |= {f"{sign}{key}": array for key, array in tensors.items()}
    return conditioning, counts[0]


def encode_prompts(name: str, model: PromptModel, texts: Sequence[str], clip_skip: int) -> list[Mapping[str, Array]]:
    """A batch of prompts.

    Raises:
        NotFinite: the model gave NaN or infinity.
    """
    found = list(model.encode_prompts(texts, clip_skip))
    for tensors in found:
        for array in tensors.values():
            if not np.isfinite(array.astype(np.float32)).all():
                raise NotFinite(name, "embeddings")
    return found
