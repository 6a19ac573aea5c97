"""Indexes, for callers without an event loop."""

import os
from collections.abc import Generator, Iterable, Sequence

from imagemesh_client.images import ImageInput
from imagemesh_client.loop_thread import LoopThread
from imagemesh_client.search import AsyncIndexes, Clustering, Duplicate, Index, Match
from imagemesh_client.types import PoolingName
from imagemesh_runtime.tensors import Array


class Indexes:
    """Pictures by their likeness; methods, errors and options are those of ``AsyncIndexes``."""

    def __init__(self, indexes: AsyncIndexes, thread: LoopThread) -> None:
        self._async = indexes
        self._thread = thread

    def add(
        self,
        index: str,
        images: ImageInput | Iterable[ImageInput],
        ids: str | Iterable[str],
        *,
        model: str = "",
        pooling: PoolingName = "auto",
    ) -> Index:
        """Put pictures into an index, an id each, and make it if it isn't there. Once this returns they are kept."""
        return self._thread.run(self._async.add(index, images, ids, model=model, pooling=pooling))

    def search(
        self,
        index: str,
        images: ImageInput | Iterable[ImageInput],
        top_k: int = 10,
        *,
        min_similarity: float | None = None,
    ) -> list[list[Match]]:
        """Find for each picture the ``top_k`` of the index that are most like it, the likest first."""
        return self._thread.run(self._async.search(index, images, top_k, min_similarity=min_similarity))

    def duplicates(self, index: str, min_similarity: float = 0.95, limit: int = 1000) -> list[Duplicate]:
        """Find at most ``limit`` pairs of the index's pictures that are at least so alike, the likest first."""
        return self._thread.run(self._async.duplicates(index, min_similarity, limit))

    def vectors(self, index: str) -> Generator[tuple[Sequence[str], Array], None, None]:
        """All ids of an index with their vectors of length 1, float32 [ids, width], in pieces, in no order."""
        return self._thread.iterate(self._async.vectors(index))

    def export(self, index: str, path: str | os.PathLike[str]) -> int:
        """Write an index to a Parquet file for other programs; how many pictures. See ``AsyncIndexes.export``."""
        return self._thread.run(self._async.export(index, path))

    def clusters(self, index: str, clusters: int = 8, *, seed: int = 0) -> Clustering:
        """Part an index's pictures into groups that are alike; the same seed parts the same pictures the same."""
        return self._thread.run(self._async.clusters(index, clusters, seed=seed))

    def list(self) -> list[Index]:
        """All indexes, by name."""
        return self._thread.run(self._async.list())

    def remove(self, index: str, ids: str | Iterable[str]) -> int:
        """Take pictures out; how many there were."""
        return self._thread.run(self._async.remove(index, ids))

    def delete(self, index: str) -> None:
        """Delete an index with all that is in it."""
        self._thread.run(self._async.delete(index))
