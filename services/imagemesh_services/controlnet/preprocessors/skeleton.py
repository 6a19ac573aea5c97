"""People as OpenPose draws them (https://arxiv.org/abs/1812.08008), which is what ControlNets were trained on."""

import math
from typing import Final

import cv2
import numpy as np

from imagemesh_runtime.tensors import Array

# For each point of OpenPose's body its number in COCO's order; the neck, which COCO doesn't have, comes after the last.
_NECK: Final = 17
_FROM_COCO: Final = (0, _NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LEFT_SHOULDER, _RIGHT_SHOULDER = 5, 6
# Limbs as pairs of OpenPose's points; limb and point i have colour i.
_LIMBS: Final = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_DIM: Final = 0.6  # of the limbs, so that joints stand out


def openpose(image: Array, people: Array, *, min_confidence: float) -> Array:
    """Limbs and joints of all people on black, without those points that are less certain than ``min_confidence``."""
    height, width = image.shape[:2]
    reach = max(round(min(height, width) / 128), 1)  # 4 pixels of 512
    canvas = np.zeros((height, width, 3), np.uint8)
    bodies = [_openpose_points(person) for person in people]
    for i, (start, end) in enumerate(_LIMBS):
        for body in bodies:
            if min(body[start, 2], body[end, 2]) >= min_confidence:
                _limb(canvas, body[start, :2], body[end, :2], reach, _colour(i))
    canvas = (canvas * _DIM).astype(np.uint8)
    for i in range(len(_FROM_COCO)):
        for body in bodies:
            if body[i, 2] >= min_confidence:
                cv2.circle(canvas, (int(body[i, 0]), int(body[i, 1])), reach, _colour(i), -1)
    return canvas


def _openpose_points(person: Array) -> Array:
    """float32 [18, 3] of COCO's [17, 3]; the neck lies between the shoulders."""
    shoulders = person[[_LEFT_SHOULDER, _RIGHT_SHOULDER]]
    neck = np.append(shoulders[:, :2].mean(axis=0), shoulders[:, 2].min())
    return np.vstack([person, neck])[list(_FROM_COCO)]


def _limb(canvas: Array, start: Array, end: Array, reach: int, colour: tuple[int, int, int]) -> None:
    middle, along = (start + end) / 2, end - start
    axes = (int(math.hypot(*along) / 2), reach)
    angle = int(math.degrees(math.atan2(along[1], along[0])))
    outline = cv2.ellipse2Poly((int(middle[0]), int(middle[1])), axes, angle, 0, 360, 1)
    cv2.fillConvexPoly(canvas, outline, colour)


def _colour(i: int) -> tuple[int, int, int]:
    """Eighteen steps of the full circle of hues from red."""
    sixth, rest = divmod(i, 3)
    rising, falling = 85 * rest, 255 - 85 * rest
    return (
        (255, rising, 0), (falling, 255, 0), (0, 255, rising), (0, falling, 255), (rising, 0, 255), (255, 0, falling),
    )[sixth]  # fmt: skip
