"""Patches of other pictures go with their labels, by their share of the picture."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from imagemesh_training import augment, data, train_vit


def test_a_pasted_patch_is_another_picture_s_and_its_label_and_share_are_told() -> None:
    labels = np.arange(40)
    flat = [np.full((data.PICTURE, data.PICTURE, 3), label, np.uint8) for label in labels]
    mixed, others, areas = augment.cut_mix(flat, labels, np.random.default_rng(0), share=0.5)
    assert 10 < (areas > 0).sum() < 30
    for picture, label, other, area in zip(mixed, labels, others, areas, strict=True):
        foreign = picture[..., 0] != label
        assert set(np.unique(picture[foreign])) <= {other}
        assert foreign.mean() == (pytest.approx(area) if other != label else 0)
    assert all((picture == label).all() for picture, label in zip(flat, labels, strict=True))


def test_the_loss_weighs_both_labels_by_what_each_shows() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    own, pasted = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0])
    alone = functional.cross_entropy(logits, own, label_smoothing=0.1)
    other = functional.cross_entropy(logits, pasted, label_smoothing=0.1)
    torch.testing.assert_close(train_vit.mixed_loss(logits, own, pasted, torch.zeros(3)), alone)
    torch.testing.assert_close(
        train_vit.mixed_loss(logits, own, pasted, torch.full((3,), 0.25)), 0.75 * alone + 0.25 * other
    )
