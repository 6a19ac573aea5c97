"""The diffusion model's training set: scenes drawn once, encoded once, kept on disk as latents."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from imagemesh_training import data
from imagemesh_training.common import autocast

MOVED = 0.4  # share of pictures a pixel off: the others repeat exactly, so that the words say exactly what to draw


@dataclass(frozen=True)
class LatentSet:
    """Scaled latents, float16 (n, 16, 8, 8), the scene each shows, and the box it was painted in, to redraw it."""

    latents: NDArray[np.float16]
    scenes: list[data.Scene]
    boxes: list[tuple[int, int, int]]

    def pick(self, rng: np.random.Generator, size: int, focus: float = 0.0) -> list[int]:
        """Random indexes; a share `focus` of them from the scenes at normal size in the middle."""
        anywhere = rng.integers(len(self.scenes), size=size)
        middle = self.plain[rng.integers(len(self.plain), size=size)]
        return [int(i) for i in np.where(rng.random(size) < focus, middle, anywhere)]

    @cached_property
    def plain(self) -> NDArray[np.int64]:
        """Indexes of the scenes at normal size in the middle: what a prompt without further words asks for."""
        return np.array([i for i, s in enumerate(self.scenes) if (s.size, s.place) == ("normal", "center")])

    def at(self, picked: list[int]) -> torch.Tensor:
        """Latents (n, 16, 8, 8) as float32."""
        return torch.from_numpy(self.latents[picked].astype(np.float32))

    def picture(self, index: int, sprites: data.Sprites) -> data.Pixels:
        scene = self.scenes[index]
        return data.paint(sprites[scene.thing], data.COLOURS[scene.colour], self.boxes[index])


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: list[data.Pixels]) -> NDArray[np.float16]:
    """Posterior means times the scaling factor: no noise of the encoder's for the UNet to learn."""
    parts = []
    for start in range(0, len(pictures), 64):
        pixels = torch.from_numpy(np.stack(pictures[start : start + 64])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast():
            latents = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        parts.append((latents.float() * vae.config.scaling_factor).half().contiguous().numpy())
    return np.concatenate(parts)


def load_or_make(path: Path, vae: AutoencoderKL, sprites: data.Sprites, count: int, seed: int) -> LatentSet:
    """The cached set at `path`, or a new one: every training pair plain, then random scenes up to `count` in all."""
    if path.exists():
        with np.load(path) as saved:
            scenes = [data.Scene(int(thing), *map(str, rest)) for thing, *rest in saved["scenes"]]
            boxes = [(int(side), int(left), int(top)) for side, left, top in saved["boxes"]]
            return LatentSet(saved["latents"], scenes, boxes)
    rng = np.random.default_rng(seed)
    plain = data.pairs(held=False)
    scenes = [*plain, *(data.random_scene(rng) for _ in range(count - len(plain)))]
    boxes = [
        data.box_of(scene, rng, jitter=int(i >= len(plain) and rng.random() < MOVED)) for i, scene in enumerate(scenes)
    ]
    made = LatentSet(np.empty((0, 16, 8, 8), np.float16), scenes, boxes)
    latents = encode(vae, [made.picture(i, sprites) for i in range(len(scenes))])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.array([[str(value) for value in astuple(scene)] for scene in scenes])
    np.savez(path, latents=latents, scenes=rows, boxes=np.array(boxes))
    return LatentSet(latents, scenes, boxes)
