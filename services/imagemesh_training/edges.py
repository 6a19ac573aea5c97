"""Edges and scribbles: what a ControlNet is shown, and how well a picture kept to it."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemesh_training.data import Pixels

Edges = NDArray[np.uint8]


def canny(picture: Pixels) -> Edges:
    """Edges of a uint8 (h, w, 3) picture: uint8 (h, w), 0 or 255."""
    height, width = picture.shape[:2]
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    found = cv2.Canny(cv2.GaussianBlur(grey, (3, 3), 0), 60, 140)
    return np.asarray(found.reshape(height, width), np.uint8)


def scribble(picture: Pixels, rng: np.random.Generator) -> Edges:
    """The outlines as a careless hand would draw them: few corners, wobbly, thin or thick."""
    lines, _ = cv2.findContours(canny(picture), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = np.zeros(picture.shape[:2], np.uint8)
    for line in lines:
        if len(line) < 12:
            continue
        corners = cv2.approxPolyDP(line, float(rng.uniform(0.8, 1.8)), False)
        wobbly = corners + rng.integers(-1, 2, corners.shape)
        cv2.polylines(drawn, [wobbly.astype(np.int32)], False, 255, int(rng.integers(1, 3)))
    return drawn


def as_hint(edges: Edges) -> Pixels:
    """Edges as the RGB picture that a ControlNet takes."""
    return np.repeat(edges[..., None], 3, axis=-1)


def overlap(a: Edges, b: Edges, within: int = 2) -> float:
    """Intersection over union of two edge pictures, where a pixel counts as met by one at most `within` pixels away.

    The intersection is the mean of what of `a` is met and what of `b` is, so that 0 pixels give the ordinary IoU.
    """
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * within + 1, 2 * within + 1))
    near_a, near_b = cv2.dilate(a, kernel) > 0, cv2.dilate(b, kernel) > 0
    met = (int(((a > 0) & near_b).sum()) + int(((b > 0) & near_a).sum())) / 2
    total = int((a > 0).sum()) + int((b > 0).sum()) - met
    return met / total if total else 1.0
