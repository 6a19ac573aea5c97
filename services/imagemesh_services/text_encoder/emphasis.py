"""What weights do to embeddings: AUTOMATIC1111's default, known there as "Original".

The embedding of each token is multiplied by the token's weight; then the whole window is multiplied by what brings the
mean of its values back to what it was. Of encoders side by side each is weighed by itself.
"""

from collections.abc import Sequence

import numpy as np

from imagemesh_runtime.tensors import Array


def weigh(embeds: Array, weights: Array, widths: Sequence[int]) -> Array:
    """Weighed embeddings; windows whose weights are all 1 keep their very bits.

    Args:
        embeds: float [windows, tokens, width].
        weights: float32 [windows, encoders x tokens], one encoder's after the other's.
        widths: of each encoder's part of ``width``.
    """
    changed = (weights != 1).any(axis=1)
    if not changed.any():
        return embeds
    parts = np.split(embeds[changed].astype(np.float32), np.cumsum(widths)[:-1], axis=-1)
    factors = np.split(weights[changed], len(widths), axis=1)
    weighed = [_restored(part, factor) for part, factor in zip(parts, factors, strict=True)]
    result = embeds.copy()
    result[changed] = np.concatenate(weighed, axis=-1).astype(embeds.dtype)
    return result


def _restored(embeds: Array, weights: Array) -> Array:
    weighed = embeds * weights[..., None]
    means = [one.mean(axis=(1, 2), keepdims=True, dtype=np.float64) for one in (embeds, weighed)]
    with np.errstate(divide="ignore", invalid="ignore"):  # the caller looks for what isn't finite
        result: Array = (weighed * (means[0] / means[1])).astype(np.float32)
    return result
