"""Small pictures with labels: each label is a colour, spoilt by noise, so that little training tells them apart."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS: Mapping[str, tuple[int, int, int]] = {"blue": (40, 60, 200), "green": (50, 170, 70), "red": (210, 50, 40)}


def coloured(name: str, seed: int, side: int = 32) -> np.ndarray:
    """A picture of that label, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    return (np.array(COLOURS[name]) + rng.normal(0, 40, (side, side, 3))).clip(0, 255).astype(np.uint8)


def put_pictures(root: Path, count: int, seed: int = 0, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """``count`` of each label, in folders named by them; answers ``root``."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(coloured(name, (seed * 1000 + number) * 1000 + i)).save(root / name / f"{i:02}.png")
    return root
