"""Random vectors of length 1, whose neighbours are as hard to tell as any."""

import numpy as np


def unit_vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    """float32 [count, width]."""
    vectors = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
