"""Preprocessors that find lines, without weights: uint8 [h, w, 3] to white lines on black, of the same shape."""

import cv2
import numpy as np

from imagemesh_runtime.tensors import Array


def rgb(grey: Array) -> Array:
    """uint8 [h, w] as [h, w, 3]."""
    return np.repeat(grey[..., None], 3, axis=2)


def canny(image: Array, *, low_threshold: int, high_threshold: int) -> Array:
    """Canny's edges, of the strongest channel's gradient (Canny, 1986)."""
    return rgb(cv2.Canny(np.ascontiguousarray(image), low_threshold, high_threshold))


def scribble(image: Array, *, threshold: int) -> Array:
    """Where a picture is darker than its surroundings, all or nothing: a difference of Gaussians."""
    pixels = image.astype(np.float32)
    darker = (cv2.GaussianBlur(pixels, (0, 0), 5.0) - cv2.GaussianBlur(pixels, (0, 0), 0.5)).min(axis=2)
    return rgb(np.where(2 * darker > threshold, 255, 0).astype(np.uint8))


def soft_edge(image: Array, *, sigma: float) -> Array:
    """The smoothed picture's gradient, of the strongest channel, 99 % of it within the range."""
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma)
    gradients = (cv2.Sobel(smooth, cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (0, 1))
    steepness = np.hypot(*gradients).max(axis=2)
    most = max(float(np.percentile(steepness, 99)), 1.0)
    return rgb((steepness / most * 255).clip(0, 255).astype(np.uint8))


def lineart(image: Array, *, sigma: float, intensity_threshold: int) -> Array:
    """Where a picture is darker than its surroundings, in grades; the middle one of the clear lines is mid-grey."""
    pixels = image.astype(np.float32)
    darker = (cv2.GaussianBlur(pixels, (0, 0), sigma) - pixels).min(axis=2).clip(0, 255)
    clear = darker[darker > intensity_threshold]
    middle = max(16.0, float(np.median(clear))) if clear.size else 16.0
    return rgb((darker / middle * 127).clip(0, 255).astype(np.uint8))


def straight_lines(image: Array, *, min_length: float, line_width: int) -> Array:
    """Straight lines of at least ``min_length`` of the shorter side (LSD, https://doi.org/10.5201/ipol.2012.gjmr-lsd)."""
    canvas = np.zeros(image.shape[:2], np.uint8)
    if min(canvas.shape) > 2:  # LSD halts the process on less
        found = cv2.createLineSegmentDetector().detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
        for x1, y1, x2, y2 in [] if found is None else found.reshape(-1, 4).round().astype(int).tolist():
            if np.hypot(x2 - x1, y2 - y1) >= min_length * min(canvas.shape):
                cv2.line(canvas, (x1, y1), (x2, y2), 255, line_width)
    return rgb(canvas)
