"""The training set of latents holds every training pair, and none that is kept for measuring."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL

from imagemesh_training import data, latents

NO_SPRITES = np.zeros((len(data.things()), 8, 8, 4), np.float32)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, quick_vae: AutoencoderKL) -> tuple[Path, latents.LatentSet]:
    path = tmp_path_factory.mktemp("cache") / "latents.npz"
    return path, latents.load_or_make(path, quick_vae, NO_SPRITES, 1600, seed=0)


def test_every_training_pair_is_there_plain_and_no_held_out_one(cached: tuple[Path, latents.LatentSet]) -> None:
    found = cached[1]
    names = [thing.name for thing in data.things()]
    assert len(found.scenes) == len(found.latents) == len(found.boxes) == 1600
    assert not any(data.held_out(names[scene.thing], scene.colour) for scene in found.scenes)
    every = {(i, colour) for i, name in enumerate(names) for colour in data.COLOURS if not data.held_out(name, colour)}
    assert {(found.scenes[i].thing, found.scenes[i].colour) for i in found.plain} == every


def test_what_was_written_is_read_back(cached: tuple[Path, latents.LatentSet], quick_vae: AutoencoderKL) -> None:
    path, made = cached
    read = latents.load_or_make(path, quick_vae, NO_SPRITES, 1600, seed=0)
    assert read.scenes == made.scenes
    assert read.boxes == made.boxes
    assert np.array_equal(read.latents, made.latents)


def test_focus_takes_more_of_the_plain_scenes(cached: tuple[Path, latents.LatentSet]) -> None:
    made, rng = cached[1], np.random.default_rng(0)
    plain = set(made.plain.tolist())
    assert all(i in plain for i in made.pick(rng, 200, focus=1.0))
