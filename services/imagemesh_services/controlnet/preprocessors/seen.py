"""Preprocessors that draw what a model saw: a picture and what ``Annotator.look`` answered, to uint8 [h, w, 3]."""

import math

import cv2
import numpy as np

from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.preprocessors.edges import rgb
from imagemesh_services.controlnet.preprocessors.palette import PALETTE


def depth(image: Array, near: Array, *, invert: bool) -> Array:
    """The nearest white, the farthest black."""
    grades = (_nearness(image, near) * 255).round().astype(np.uint8)
    return rgb(255 - grades if invert else grades)


def normal(image: Array, near: Array, *, background: float, strength: float) -> Array:
    """The surfaces' directions as red, green and blue, from the slopes of the depth; what is far stands upright.

    As ControlNet's training data was made of depth: the slopes by Sobel, two pi for the axis towards the viewer.
    """
    nearness = _nearness(image, near)
    slopes = [cv2.Sobel(nearness * np.float32(strength), cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (1, 0)]
    for slope in slopes:
        slope[nearness < background] = 0
    directions = np.stack([*slopes, np.full_like(nearness, 2 * math.pi)], axis=2)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    return np.asarray((directions * 127.5 + 127.5).clip(0, 255).astype(np.uint8))


def segmentation(image: Array, classes: Array) -> Array:
    """Each class in its colour of ADE20K's."""
    height, width = image.shape[:2]
    colours = PALETTE[classes % len(PALETTE)]
    return np.asarray(cv2.resize(colours, (width, height), interpolation=cv2.INTER_NEAREST))


def edges(image: Array, certainty: Array) -> Array:
    """The surer an edge, the brighter."""
    height, width = image.shape[:2]
    fitted = cv2.resize(certainty, (width, height), interpolation=cv2.INTER_LINEAR)
    return rgb((fitted * 255).round().astype(np.uint8))


def _nearness(image: Array, near: Array) -> Array:
    """float32 [h, w] from 0, the farthest, to 1, at the picture's size."""
    low, high = float(near.min()), float(near.max())
    scaled = (near.astype(np.float32) - low) / max(high - low, 1e-6)
    height, width = image.shape[:2]
    fitted = cv2.resize(scaled, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(fitted, dtype=np.float32)
