"""Groups of vectors that are alike: spherical k-means (Dhillon and Modha, 2001), as faiss has it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.tensors import Array

# Vectors that the centres are sought among: so many a group, and no more in all.
_A_GROUP: Final = 256
_MOST: Final = 65_536
_ITERATIONS: Final = 25


class Sample:
    """Vectors that ids and the seed alone choose, in whatever order they come: those whose hashes are the smallest."""

    def __init__(self, groups: int, seed: int) -> None:
        self._size = min(groups * _A_GROUP, _MOST)
        self._seed = seed.to_bytes(8, "little")
        self._pieces: list[tuple[Array, Array]] = []
        self._count = 0
        self._worst: int | None = None  # what a further hash must be below; None: there is room

    def add(self, ids: Sequence[str], vectors: Array) -> None:
        """Take a piece, float32 [ids, width], into account."""
        hashes = np.array([self._hash(one) for one in ids], np.uint64)
        if self._worst is not None:
            better = hashes < self._worst
            hashes, vectors = hashes[better], vectors[better]
        self._pieces.append((hashes, vectors))
        self._count += len(hashes)
        if self._count > 2 * self._size:
            self._settle()

    def vectors(self) -> Array:
        """What was chosen, float32 [n, width], always in the same order.

        Raises:
            FailedPrecondition: nothing came.
        """
        if not self._count:
            raise FailedPrecondition("the index was emptied meanwhile")
        self._settle()
        return self._pieces[0][1]

    def _settle(self) -> None:
        hashes, vectors = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        chosen = np.argsort(hashes, kind="stable")[: self._size]
        self._pieces, self._count = [(hashes[chosen], vectors[chosen])], len(chosen)
        if len(chosen) == self._size:
            self._worst = int(hashes[chosen[-1]])

    def _hash(self, one: str) -> int:
        return int.from_bytes(hashlib.blake2b(one.encode(), digest_size=8, key=self._seed).digest(), "little")


def centres_of(sample: Sample, groups: int, seed: int) -> Array:
    """Unit vectors amid ``groups`` groups of the sample's, float32 [groups, width].

    Raises:
        FailedPrecondition: faiss is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError:
        raise FailedPrecondition("grouping needs the package faiss, which is not installed") from None
    vectors = sample.vectors()
    kmeans = faiss.Kmeans(
        vectors.shape[1], min(groups, len(vectors)), niter=_ITERATIONS, seed=seed, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=len(vectors),
    )  # fmt: skip
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    found: Array | None = kmeans.centroids
    assert found is not None
    return found


@dataclass
class Group:
    """Pictures that are alike: how many, the one nearest to the centre, and the mean cosine to it."""

    count: int
    example: str
    mean_similarity: float


class Clustering:
    """Which group each picture belongs to. First ``add`` all pieces, then ``order``, then read."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self._ids: list[str] = []
        self._found: list[tuple[Array, Array]] = []

    def add(self, ids: Sequence[str], vectors: Array, centres: Array) -> None:
        """A piece, float32 [ids, width]: each to the nearest of the centres."""
        cosines = vectors @ centres.T
        nearest = cosines.argmax(axis=1)
        self._ids += ids
        self._found.append((nearest, np.clip(cosines[np.arange(len(ids)), nearest], -1, 1)))

    def order(self) -> None:
        """The largest group first; a group without pictures is none."""
        if not self._found:
            return
        nearest, cosines = (np.concatenate(column) for column in zip(*self._found, strict=True))
        counts = np.bincount(nearest)
        old = sorted(np.flatnonzero(counts).tolist(), key=lambda group: (-counts[group], group))
        place = np.zeros(len(counts), np.int64)
        place[old] = np.arange(len(old))
        self._found = [(place[nearest], cosines)]
        self.groups = [self._group(np.flatnonzero(nearest == group), cosines) for group in old]

    def pieces(self, size: int) -> Iterator[list[tuple[str, int, float]]]:
        """Each picture with its group's number and its cosine to the centre."""
        for nearest, cosines in self._found:
            for start in range(0, len(self._ids), size):
                part = slice(start, start + size)
                yield list(zip(self._ids[part], nearest[part].tolist(), cosines[part].tolist(), strict=True))

    def _group(self, rows: Array, cosines: Array) -> Group:
        best = float(cosines[rows].max())
        example = min(self._ids[row] for row in rows[cosines[rows] == best].tolist())
        return Group(len(rows), example, float(cosines[rows].mean()))
