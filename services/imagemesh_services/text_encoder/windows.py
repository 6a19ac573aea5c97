"""Prompts cut into the windows that an encoder of fixed length sees."""

from collections.abc import Sequence

import numpy as np

from imagemesh_services.text_encoder.backend import Tokens

# A token's id and its weight.
Weighted = tuple[int, float]


def cut(sections: Sequence[Sequence[Weighted]], window: int, start: int, end: int, pad: int) -> Tokens:
    """Windows of ``window`` tokens with a start and an end of their own; every section begins one, a long one goes on.

    Args:
        start, end, pad: the ids around a window's tokens: one of each of the first two, and padding after the end.
    """
    inner = window - 2
    cuts = [section[i : i + inner] for section in sections for i in range(0, max(len(section), 1), inner)]
    ids = np.full((len(cuts), window), pad, dtype=np.int64)
    weights = np.ones((len(cuts), window), dtype=np.float32)
    for row, tokens in enumerate(cuts):
        ids[row, : len(tokens) + 2] = [start, *(token for token, _ in tokens), end]
        weights[row, 1 : len(tokens) + 1] = [weight for _, weight in tokens]
    return Tokens(ids, sum(map(len, sections)), weights if (weights != 1).any() else None)


def side_by_side(parts: Sequence[Tokens]) -> Tokens:
    """What several encoders see, one's tokens after the other's."""
    count = max(part.count for part in parts)
    ids = np.concatenate([part.windows for part in parts], axis=1)
    if all(part.weights is None for part in parts):
        return Tokens(ids, count)
    weights = [np.ones(part.windows.shape, np.float32) if part.weights is None else part.weights for part in parts]
    return Tokens(ids, count, np.concatenate(weights, axis=1))
