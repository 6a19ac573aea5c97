"""Poses are what no caption tells, hints follow them, and the cached set is never another run's."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL

from imagemesh_training import data, edges, poses
from imagemesh_training.train_controlnet import hints_of

CORNER = 32  # the sprites below are one bright quarter on nothing, top left


@pytest.fixture(scope="module")
def quarters() -> data.Sprites:
    sprites = np.zeros((len(data.things()), data.SPRITE, data.SPRITE, 4), np.float32)
    sprites[:, CORNER : data.SPRITE // 2, CORNER : data.SPRITE // 2] = 1.0
    return sprites


def middle_of_ink(pose: poses.Pose, sprites: data.Sprites) -> tuple[float, float]:
    rows, columns = np.nonzero(poses.draw(pose, sprites).min(axis=-1) > 200)
    return float(columns.mean()), float(rows.mean())


def test_a_picture_is_mirrored_turned_and_moved_as_its_pose_says(quarters: data.Sprites) -> None:
    scene = data.Scene(0, "black")
    upright = middle_of_ink(poses.Pose(scene, 64, 0, 0, 0.0, False), quarters)
    mirrored = middle_of_ink(poses.Pose(scene, 64, 0, 0, 0.0, True), quarters)
    turned = middle_of_ink(poses.Pose(scene, 64, 0, 0, -90.0, False), quarters)
    small = middle_of_ink(poses.Pose(scene, 32, 32, 32, 0.0, False), quarters)
    assert upright == pytest.approx((23.5, 23.5), abs=1)
    assert mirrored == pytest.approx((39.5, 23.5), abs=1)
    assert turned == pytest.approx((39.5, 23.5), abs=1)
    assert small == pytest.approx((43.5, 43.5), abs=1)


def test_poses_differ_stay_in_the_picture_and_are_of_training_pairs() -> None:
    rng = np.random.default_rng(0)
    found = [poses.random_pose(rng) for _ in range(500)]
    names = [thing.name for thing in data.things()]
    assert not any(data.held_out(names[pose.scene.thing], pose.scene.colour) for pose in found)
    assert all(min(pose.left, pose.top) >= 0 for pose in found)
    assert all(max(pose.left, pose.top) + pose.side <= data.PICTURE for pose in found)
    assert len(set(found)) == len(found)
    held = poses.random_pose(rng, held=True)
    assert data.held_out(names[held.scene.thing], held.scene.colour)


def test_a_hint_is_the_edges_of_its_own_pose(quarters: data.Sprites) -> None:
    scene = data.Scene(0, "black")
    shown = [poses.Pose(scene, 40, left, 8, 0.0, False) for left in (0, 20)] * 8
    hints = hints_of(shown, quarters, np.random.default_rng(0)).numpy()
    assert hints.shape == (16, 3, 64, 64)
    assert set(np.unique(hints)) == {0.0, 1.0}
    for pose, hint in zip(shown, hints, strict=True):
        own = edges.canny(poses.draw(pose, quarters))
        assert edges.overlap((hint[0] * 255).astype(np.uint8), own, within=3) > 0.9


def test_the_cached_set_is_read_back_and_another_one_is_made_anew(tmp_path: Path, quick_vae: AutoencoderKL) -> None:
    sprites = np.zeros((len(data.things()), 8, 8, 4), np.float32)
    path = tmp_path / "cache" / "poses.npz"
    made = poses.load_or_make(path, quick_vae, sprites, 6, seed=0)
    written = path.read_bytes()
    again = poses.load_or_make(path, quick_vae, sprites, 6, seed=0)
    assert path.read_bytes() == written
    assert np.array_equal(again.latents, made.latents)
    assert again.poses == made.poses
    other = poses.load_or_make(path, quick_vae, sprites, 6, seed=1)
    assert other.poses != made.poses
    assert other.at([0]).shape == (1, 16, 8, 8)
