"""Groups of vectors: what is alike comes together, and the seed alone decides how."""

import numpy as np
import pytest

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_services.vit.search.clustering import Clustering, Sample, centres_of
from tests.support.vectors import unit_vectors


def cones(count: int, groups: int, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors, each near one of so many that are far apart, and which one that is."""
    centres = np.eye(width, dtype=np.float32)[:groups]
    own = np.sqrt(np.arange(count) * groups**2 / count).astype(int)  # the later, the more
    vectors = centres[own] + 0.1 * unit_vectors(count, width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), own


def clustered(ids: list[str], vectors: np.ndarray, groups: int, seed: int, piece: int = 50) -> Clustering:
    sample, clustering = Sample(groups, seed), Clustering()
    parts = [slice(start, start + piece) for start in range(0, len(ids), piece)]
    for part in parts:
        sample.add(ids[part], vectors[part])
    centres = centres_of(sample, groups, seed)
    for part in parts:
        clustering.add(ids[part], vectors[part], centres)
    clustering.order()
    return clustering


def members(clustering: Clustering) -> dict[str, int]:
    return {one: group for piece in clustering.pieces(7) for one, group, _ in piece}


def test_what_is_alike_comes_together_the_largest_group_first():
    vectors, own = cones(300, 4)
    ids = [f"{i:03}" for i in range(300)]
    clustering = clustered(ids, vectors, 4, seed=0)
    found = members(clustering)
    pairs = {(own[i], found[one]) for i, one in enumerate(ids)}
    assert len(pairs) == 4
    counts = [group.count for group in clustering.groups]
    assert counts == sorted(np.bincount(own).tolist(), reverse=True)
    for number, group in enumerate(clustering.groups):
        told = [cosine for piece in clustering.pieces(9) for _, place, cosine in piece if place == number]
        assert group.mean_similarity == pytest.approx(np.mean(told), abs=1e-5)
        best = max((cosine, one) for piece in clustering.pieces(9) for one, place, cosine in piece if place == number)
        assert (group.example, found[group.example]) == (best[1], number)


def test_the_order_in_which_they_come_changes_nothing():
    vectors = unit_vectors(4000, 16)
    ids = [str(i) for i in range(4000)]
    first = members(clustered(ids, vectors, 5, seed=3))
    turned = members(clustered(ids[::-1], vectors[::-1], 5, seed=3, piece=900))
    assert first == turned
    assert first != members(clustered(ids, vectors, 5, seed=4))


def test_equal_vectors_leave_no_empty_group():
    vectors = np.repeat(unit_vectors(1, 8), 10, axis=0)
    clustering = clustered([str(i) for i in range(10)], vectors, 3, seed=0)
    assert sum(group.count for group in clustering.groups) == 10
    assert all(group.count for group in clustering.groups)


def test_nothing_to_part_is_said():
    with pytest.raises(FailedPrecondition, match="emptied"):
        centres_of(Sample(2, 0), 2, 0)
