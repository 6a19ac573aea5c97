"""What is done to a picture that is learned from, so that it never comes twice as the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Final

import numpy as np
from PIL import Image

from imagemesh_training.finetune.pictures import Picture

LEAST_AREA: Final = 0.6  # of what is taken, as a share of the picture's
MOST_AREA: Final = 1.7
MOST_STRETCH: Final = 4 / 3


def changed(picture: Picture, kinds: Collection[str], seed: int, epoch: int, index: int) -> Picture:
    """The picture, uint8 [height, width, 3], under some of ``KINDS``.

    What is drawn depends on the three numbers alone, so that a run which is resumed in the middle sees the same.
    """
    rng = np.random.default_rng((seed, epoch, index))
    for name, change in KINDS.items():
        if name in kinds:
            picture = change(picture, rng)
    return picture


def zoom(picture: Picture, rng: np.random.Generator) -> Picture:
    """A part of the picture, or the picture with its edges drawn out, at its size: of random area, aspect and place.

    After Szegedy et al. (https://arxiv.org/abs/1409.4842), whose crops only make things larger.
    """
    height, width = picture.shape[:2]
    side = np.sqrt(rng.uniform(LEAST_AREA, MOST_AREA))
    stretch = np.sqrt(np.exp(rng.uniform(-np.log(MOST_STRETCH), np.log(MOST_STRETCH))))
    wide, high = width * side * stretch, height * side / stretch
    left, top = (rng.uniform(min(0, room), max(0, room)) for room in (width - wide, height - high))
    beyond = [max(0, math.ceil(taken - there)) for taken, there in ((high, height), (wide, width))]
    whole = np.pad(picture, ((beyond[0], beyond[0]), (beyond[1], beyond[1]), (0, 0)), "edge")
    box = (left + beyond[1], top + beyond[0], left + beyond[1] + wide, top + beyond[0] + high)
    return np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.BICUBIC, box=box))


def flip(picture: Picture, rng: np.random.Generator) -> Picture:
    """Half of them left to right."""
    return picture[:, ::-1] if rng.random() < 0.5 else picture


def colour(picture: Picture, rng: np.random.Generator) -> Picture:
    """Brightness, contrast and saturation by up to a fifth."""
    image = picture.astype(np.float32) * np.float32(rng.uniform(0.8, 1.2))
    image = (image - image.mean()) * np.float32(rng.uniform(0.8, 1.2)) + image.mean()
    grey = image.mean(axis=-1, keepdims=True)
    image = grey + (image - grey) * np.float32(rng.uniform(0.8, 1.2))
    return np.asarray(image.round().clip(0, 255), np.uint8)


KINDS: Final[Mapping[str, Callable[[Picture, np.random.Generator], Picture]]] = {
    "zoom": zoom,
    "flip": flip,
    "colour": colour,
}
