"""Pictures whose layout no caption tells: things of any size, anywhere, turned and mirrored.

What a ControlNet learns from and is measured on. On pictures laid out as their captions say, the UNet draws nearly the
given edges by itself, and a hint would teach nothing.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from imagemesh_training import data, latents
from imagemesh_training.data import COLOURS, PICTURE, SPRITE, Pixels, Scene


@dataclass(frozen=True)
class Pose:
    """A thing on a colour, in the square at (`left`, `top`) of this side in pixels, turned and mirrored."""

    scene: Scene
    side: int
    left: int
    top: int
    degrees: float
    mirrored: bool


def random_pose(rng: np.random.Generator, *, held: bool = False) -> Pose:
    """A pair of the training set, or with `held` of those kept for measuring, in a pose that its words don't tell."""
    scene = data.random_scene(rng, held=held)
    side = int(rng.integers(24, PICTURE - 3))
    left, top = (int(v) for v in rng.integers(0, PICTURE - side + 1, 2))
    degrees = float(rng.uniform(-60, 60)) if rng.random() < 0.6 else 0.0
    return Pose(Scene(scene.thing, scene.colour), side, left, top, degrees, bool(rng.random() < 0.5))


def draw(pose: Pose, sprites: data.Sprites) -> Pixels:
    """The picture of a pose: uint8 (PICTURE, PICTURE, 3)."""
    sprite = sprites[pose.scene.thing]
    if pose.mirrored:
        sprite = np.ascontiguousarray(sprite[:, ::-1])
    if pose.degrees:
        angle = np.deg2rad(pose.degrees)
        fits = 1 / (abs(np.cos(angle)) + abs(np.sin(angle)))  # the turned square still lies within the old one
        matrix = cv2.getRotationMatrix2D((SPRITE / 2, SPRITE / 2), pose.degrees, float(fits))
        sprite = np.asarray(cv2.warpAffine(sprite, matrix, (SPRITE, SPRITE), flags=cv2.INTER_AREA), np.float32)
    return data.paint(sprite, COLOURS[pose.scene.colour], (pose.side, pose.left, pose.top))


@dataclass(frozen=True)
class PosedSet:
    """Scaled latents, float16 (n, 16, 8, 8), and what each shows."""

    latents: NDArray[np.float16]
    poses: list[Pose]

    def at(self, picked: list[int]) -> torch.Tensor:
        """Latents (n, 16, 8, 8) as float32."""
        return torch.from_numpy(self.latents[picked].astype(np.float32))


def load_or_make(path: Path, vae: AutoencoderKL, sprites: data.Sprites, count: int, seed: int) -> PosedSet:
    """The cached set at `path`, or `count` new pictures, encoded."""
    rng = np.random.default_rng(seed)
    poses = [random_pose(rng) for _ in range(count)]
    wanted = np.array([repr(astuple(pose)) for pose in poses])
    if path.exists():
        with np.load(path) as saved:
            if np.array_equal(saved["poses"], wanted):
                return PosedSet(saved["latents"], poses)
    made = latents.encode(vae, [draw(pose, sprites) for pose in poses])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, latents=made, poses=wanted)
    return PosedSet(made, poses)
