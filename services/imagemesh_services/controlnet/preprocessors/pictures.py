"""Preprocessors that change a picture as a whole, without weights: uint8 [h, w, 3] to the same shape."""

import cv2
import numpy as np

from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.preprocessors.edges import rgb


def unchanged(image: Array) -> Array:
    """The picture."""
    return image


def invert(image: Array) -> Array:
    """Its negative."""
    return 255 - image


def threshold(image: Array, *, threshold: int) -> Array:
    """White where every channel is above the threshold."""
    return rgb(np.where(image.min(axis=2) > threshold, 255, 0).astype(np.uint8))


def blur(image: Array, *, sigma: float) -> Array:
    """A Gaussian blur."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma))


def tile(image: Array, *, factor: float) -> Array:
    """``factor`` times smaller and back: its details are gone, its content is not."""
    height, width = image.shape[:2]
    small = (max(round(width / factor), 1), max(round(height / factor), 1))
    return np.asarray(cv2.resize(cv2.resize(image, small, interpolation=cv2.INTER_AREA), (width, height)))


def colour_grid(image: Array, *, cell: int) -> Array:
    """Squares of ``cell`` pixels, each of its mean colour."""
    height, width = image.shape[:2]
    small = (max(round(width / cell), 1), max(round(height / cell), 1))
    means = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(means, (width, height), interpolation=cv2.INTER_NEAREST))


def grey(image: Array, *, method: str, gamma: float) -> Array:
    """Lightness without colour: CIE L*, or the highest channel."""
    light = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0] if method == "luminance" else image.max(axis=2)
    return rgb(((light / 255.0) ** gamma * 255).round().astype(np.uint8))


def shuffle(image: Array, *, scale: int, seed: int) -> Array:
    """The picture along two random smooth flows of ``scale`` pixels: its colours and textures, its composition gone."""
    height, width = image.shape[:2]
    numbers = np.random.default_rng(seed)
    across, down = (_flow(numbers, height, width, scale) for _ in range(2))
    return np.asarray(cv2.remap(image, across * (width - 1), down * (height - 1), cv2.INTER_LINEAR))


def _flow(numbers: np.random.Generator, height: int, width: int, scale: int) -> Array:
    """Smooth noise from 0 to 1, float32 [height, width]."""
    rows, columns = height // scale + 3, width // scale + 3
    coarse = numbers.random((rows, columns), dtype=np.float32)
    # Each number is a place of ``scale`` pixels; the outermost ones have neighbours on one side only.
    grid_y, grid_x = np.mgrid[0:height, 0:width].astype(np.float32) / scale + 1
    fine = cv2.remap(coarse, grid_x, grid_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    low, high = float(fine.min()), float(fine.max())
    return np.asarray((fine - low) / max(high - low, 1e-6), dtype=np.float32)
