"""Augmentation for the ViT: two disjoint families, one to train with and one that is only ever measured with."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemesh_training import data
from imagemesh_training.data import PICTURE, Pixels

Floats = NDArray[np.float32]


def training_picture(thing: int, sprites: data.Sprites, rng: np.random.Generator) -> Pixels:
    """A thing at any size, turned and mirrored, on any colour, then `degrade`d: uint8 (64, 64, 3).

    It stands anywhere, or half the time where scenes have it.
    """
    sprite = sprites[thing]
    if rng.random() < 0.5:
        sprite = _turn(sprite, float(rng.uniform(-15, 15)))
    if rng.random() < 0.3:
        sprite = sprite[:, ::-1]
    picture = data.paint(sprite, _background(rng), _box(thing, rng))
    return degrade(picture, rng)


def _box(thing: int, rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < 0.5:
        return data.box_of(data.Scene(thing, "white", *data.random_layout(rng)), rng)
    side = 26 + int((PICTURE - 25) * rng.random() ** 2)  # more of the small: they are the hardest
    left, top = (int(v) for v in rng.integers(0, PICTURE - side + 1, 2))
    return side, left, top


def _background(rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < 0.5:
        return data.COLOURS[str(rng.choice(list(data.COLOURS)))]
    red, green, blue = rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def _turn(sprite: data.Sprites, degrees: float) -> data.Sprites:
    middle = (data.SPRITE / 2, data.SPRITE / 2)
    matrix = cv2.getRotationMatrix2D(middle, degrees, 0.95)
    return np.asarray(cv2.warpAffine(sprite, matrix, (data.SPRITE, data.SPRITE)), np.float32)


def degrade(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """What a small VAE does to a picture, roughly: softness, noise, ringing, shifted colours."""
    image = picture.astype(np.float32)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, 1.3)))
    if rng.random() < 0.3:
        side = int(rng.integers(28, 60))
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (PICTURE, PICTURE), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.6:
        image = _jitter_colours(image, rng)
    if rng.random() < 0.5:
        least, most = (1, 14) if rng.random() < 0.6 else (14, 60)
        image = image + rng.normal(0, rng.uniform(least, most), image.shape).astype(np.float32)
    result: Pixels = image.round().clip(0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        quality = int(rng.integers(30, 95))
        _, coded = cv2.imencode(".jpg", result, [cv2.IMWRITE_JPEG_QUALITY, quality])
        result = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return result


def _jitter_colours(image: Floats, rng: np.random.Generator) -> Floats:
    contrast, brightness = rng.uniform(0.55, 1.4), rng.uniform(-45, 45)
    image = (image - 128) * np.float32(contrast) + np.float32(128 + brightness)
    grey = image.mean(axis=-1, keepdims=True)
    image = grey + (image - grey) * np.float32(rng.uniform(0.6, 1.4))
    return image * rng.uniform(0.92, 1.08, 3).astype(np.float32)


def cut_mix(
    pictures: list[Pixels], labels: NDArray[np.int64], rng: np.random.Generator, share: float = 0.4
) -> tuple[list[Pixels], NDArray[np.int64], Floats]:
    """Patches of other pictures of the batch in a share of them (Yun et al., CutMix, 2019).

    Returns the pictures, the labels (n,) of what was pasted in, and how much of each picture that is, 0 to 1 (n,).
    """
    others = rng.permutation(len(pictures))
    mixed, areas = [], np.zeros(len(pictures), np.float32)
    for i, picture in enumerate(pictures):
        if rng.random() < share:
            height, width = (int(v) for v in rng.integers(8, 25, 2))
            top, left = int(rng.integers(PICTURE - height + 1)), int(rng.integers(PICTURE - width + 1))
            picture = picture.copy()
            picture[top : top + height, left : left + width] = pictures[others[i]][
                top : top + height, left : left + width
            ]
            areas[i] = height * width / PICTURE**2
        mixed.append(picture)
    return mixed, labels[others], areas


def unseen(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """One augmentation kept out of training: shear, perspective, gamma, motion blur, a covered patch or dead pixels."""
    kinds = (_shear, _perspective, _gamma, _motion_blur, _cover, _dead_pixels)
    return kinds[int(rng.integers(len(kinds)))](picture, rng)


def _warp(picture: Pixels, matrix: Floats) -> Pixels:
    size = (PICTURE, PICTURE)
    return np.asarray(cv2.warpPerspective(picture, matrix, size, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _shear(picture: Pixels, rng: np.random.Generator) -> Pixels:
    amount = rng.uniform(0.1, 0.25) * rng.choice((-1, 1))
    matrix = np.array([[1, amount, -amount * PICTURE / 2], [0, 1, 0], [0, 0, 1]], np.float32)
    return _warp(picture, matrix)


def _perspective(picture: Pixels, rng: np.random.Generator) -> Pixels:
    corners = np.array([[0, 0], [63, 0], [63, 63], [0, 63]], np.float32)
    moved = corners + rng.uniform(-7, 7, (4, 2)).astype(np.float32)
    return _warp(picture, np.asarray(cv2.getPerspectiveTransform(corners, moved), np.float32))


def _gamma(picture: Pixels, rng: np.random.Generator) -> Pixels:
    power = rng.choice((rng.uniform(0.6, 0.8), rng.uniform(1.25, 1.7)))
    return np.asarray(((picture / 255.0) ** power * 255).round(), np.uint8)


def _motion_blur(picture: Pixels, rng: np.random.Generator) -> Pixels:
    kernel = np.eye(5, dtype=np.float32) if rng.random() < 0.5 else np.fliplr(np.eye(5, dtype=np.float32))
    return np.asarray(cv2.filter2D(picture, -1, kernel / 5), np.uint8)


def _cover(picture: Pixels, rng: np.random.Generator) -> Pixels:
    covered = picture.copy()
    left, top = rng.integers(0, PICTURE - 14, 2)
    covered[top : top + 14, left : left + 14] = 127
    return covered


def _dead_pixels(picture: Pixels, rng: np.random.Generator) -> Pixels:
    spoiled = picture.copy()
    spoiled[rng.random((PICTURE, PICTURE)) < 0.06] = 0
    spoiled[rng.random((PICTURE, PICTURE)) < 0.06] = 255
    return spoiled
