"""Indexes of pictures, and what is found in them."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from imagemesh.v1 import search_service_pb2 as pb
from imagemesh.v1 import search_service_pb2_grpc as rpc
from imagemesh_client.fields import UINT32, number, text, whole
from imagemesh_client.images import ImageInput, as_list
from imagemesh_client.types import PoolingName
from imagemesh_client.vision import MAX_IMAGES, POOLINGS, pictures
from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array, from_proto

_POOLING_NAMES: dict[int, PoolingName] = {value: name for name, value in POOLINGS.items()}


@dataclass(frozen=True)
class Index:
    """An index as it stands.

    Attributes:
        model: what made its vectors, with ``pooling``.
        width: numbers of a vector.
        count: how many pictures it holds.
        store: what keeps it, such as "faiss".
    """

    name: str
    model: str
    pooling: PoolingName
    width: int
    count: int
    store: str


@dataclass(frozen=True)
class Match:
    """A picture of an index; ``similarity`` is the cosine, -1 to 1."""

    id: str
    similarity: float


@dataclass(frozen=True)
class Duplicate:
    """Two pictures of an index that are nearly the same."""

    first: str
    second: str
    similarity: float


@dataclass(frozen=True)
class Group:
    """Pictures of an index that are alike.

    Attributes:
        count: how many.
        example: the one that is most like the group's centre.
        mean_similarity: of its pictures to the centre.
    """

    count: int
    example: str
    mean_similarity: float


@dataclass(frozen=True)
class Clustering:
    """Groups, the largest first, and of each picture its group's number and its likeness to that group's centre."""

    groups: tuple[Group, ...]
    members: Mapping[str, tuple[int, float]]


class AsyncIndexes:
    """Pictures by their likeness: the gateway's indexes, which are on a disk and outlive it."""

    def __init__(self, connect: Callable[[], Peer]) -> None:
        self._connect = connect

    async def add(
        self,
        index: str,
        images: ImageInput | Iterable[ImageInput],
        ids: str | Iterable[str],
        *,
        model: str = "",
        pooling: PoolingName = "auto",
    ) -> Index:
        """Put pictures into an index, an id each, and make it if it isn't there. Once this returns they are kept.

        A picture takes the place of one with its id. ``model`` and ``pooling`` are what a new index makes vectors with;
        of an older one they are known.

        Raises:
            InvalidArgument: more than 64 pictures, an id that can't be, or another model than the index's.
        """
        if pooling not in POOLINGS:
            raise InvalidArgument("pooling", pooling, ", ".join(POOLINGS))
        request = pb.IndexImagesRequest(
            index=text("index", index),
            images=await asyncio.to_thread(pictures, _bounded(images)),
            ids=_ids(ids),
            model=text("model", model),
            pooling=POOLINGS[pooling],
        )
        peer = self._connect()
        return _index((await peer.unary(rpc.SearchServiceStub(peer.channel).IndexImages, request)).index)

    async def search(
        self,
        index: str,
        images: ImageInput | Iterable[ImageInput],
        top_k: int = 10,
        *,
        min_similarity: float | None = None,
    ) -> list[list[Match]]:
        """Find for each picture the ``top_k`` of the index that are most like it, the likest first."""
        request = pb.SearchImagesRequest(
            index=text("index", index),
            images=await asyncio.to_thread(pictures, _bounded(images)),
            top_k=whole("top_k", top_k, UINT32, least=1),
            min_similarity=None if min_similarity is None else number("min_similarity", min_similarity),
        )
        peer = self._connect()
        answer = await peer.unary(rpc.SearchServiceStub(peer.channel).SearchImages, request)
        return [[Match(one.id, one.similarity) for one in result.matches] for result in answer.results]

    async def duplicates(self, index: str, min_similarity: float = 0.95, limit: int = 1000) -> list[Duplicate]:
        """Find at most ``limit`` pairs of the index's pictures that are at least so alike, the likest first."""
        request = pb.FindDuplicatesRequest(
            index=text("index", index),
            min_similarity=number("min_similarity", min_similarity),
            limit=whole("limit", limit, UINT32, least=1),
        )
        peer = self._connect()
        answer = await peer.unary(rpc.SearchServiceStub(peer.channel).FindDuplicates, request)
        return [Duplicate(one.first_id, one.second_id, one.similarity) for one in answer.pairs]

    async def vectors(self, index: str) -> AsyncGenerator[tuple[Sequence[str], Array], None]:
        """All ids of an index with their vectors of length 1, float32 [ids, width], in pieces, in no order."""
        async with aclosing(self._export(index)) as answers:
            async for answer in answers:
                if answer.ids:
                    yield list(answer.ids), from_proto(answer.vectors, "vectors", dtypes=["float32"]).copy()

    async def export(self, index: str, path: str | os.PathLike[str]) -> int:
        """Write an index to a Parquet file for other programs; how many pictures.

        The columns are "id" and "vector", a list of ``width`` float32; the schema's metadata tells of the index. The
        file is there once it is whole. Needs ``pip install 'imagemesh[parquet]'``.
        """
        from imagemesh_client.parquet import ParquetFile

        async with aclosing(self._export(index)) as answers:
            first = await anext(answers)
            file = await asyncio.to_thread(ParquetFile, path, _index(first.index))
            try:
                async for answer in answers:
                    vectors = from_proto(answer.vectors, "vectors", dtypes=["float32"], shape=(len(answer.ids), None))
                    await asyncio.to_thread(file.add, answer.ids, vectors)
                return await asyncio.to_thread(file.finish)
            finally:
                file.discard()

    async def clusters(self, index: str, clusters: int = 8, *, seed: int = 0) -> Clustering:
        """Part an index's pictures into groups that are alike; the same seed parts the same pictures the same."""
        request = pb.ClusterImagesRequest(
            index=text("index", index),
            clusters=whole("clusters", clusters, UINT32, least=1),
            seed=whole("seed", seed, UINT32),
        )
        groups: tuple[Group, ...] = ()
        members: dict[str, tuple[int, float]] = {}
        peer = self._connect()
        async with aclosing(peer.stream(rpc.SearchServiceStub(peer.channel).ClusterImages, request)) as answers:
            async for answer in answers:
                groups += tuple(Group(one.count, one.example_id, one.mean_similarity) for one in answer.clusters)
                members |= {one.id: (one.cluster, one.similarity) for one in answer.images}
        return Clustering(groups, members)

    def _export(self, index: str) -> AsyncGenerator[pb.ExportVectorsResponse, None]:
        peer = self._connect()
        request = pb.ExportVectorsRequest(index=text("index", index))
        return peer.stream(rpc.SearchServiceStub(peer.channel).ExportVectors, request)

    async def list(self) -> list[Index]:
        """All indexes, by name."""
        peer = self._connect()
        answer = await peer.unary(rpc.SearchServiceStub(peer.channel).ListIndexes, pb.ListIndexesRequest())
        return [_index(one) for one in answer.indexes]

    async def remove(self, index: str, ids: str | Iterable[str]) -> int:
        """Take pictures out; how many there were."""
        request = pb.RemoveImagesRequest(index=text("index", index), ids=_ids(ids))
        peer = self._connect()
        removed: int = (await peer.unary(rpc.SearchServiceStub(peer.channel).RemoveImages, request)).removed
        return removed

    async def delete(self, index: str) -> None:
        """Delete an index with all that is in it."""
        peer = self._connect()
        request = pb.DeleteIndexRequest(index=text("index", index))
        await peer.unary(rpc.SearchServiceStub(peer.channel).DeleteIndex, request)


def _bounded(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    found = as_list(images)
    if len(found) > MAX_IMAGES:
        raise InvalidArgument("images", f"{len(found)} pictures", f"1 to {MAX_IMAGES} pictures a call")
    return found


def _ids(ids: str | Iterable[str]) -> Iterable[str]:
    return [text(f"ids[{i}]", one) for i, one in enumerate([ids] if isinstance(ids, str) else ids)]


def _index(info: pb.IndexInfo) -> Index:
    return Index(info.name, info.model, _POOLING_NAMES[info.pooling], info.width, info.count, info.store)
