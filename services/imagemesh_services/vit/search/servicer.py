"""Requests to vectors and back, for search."""

import asyncio
import heapq
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Final, TypeVar

import numpy as np

from imagemesh.v1 import image_pb2
from imagemesh.v1 import search_service_pb2 as pb
from imagemesh.v1 import search_service_pb2_grpc as rpc
from imagemesh.v1 import vit_service_pb2 as vit
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFinite, NotFound, Overloaded
from imagemesh_runtime.limits import (
    MAX_CLUSTERS,
    MAX_ID_CHARACTERS,
    MAX_IMAGES,
    MAX_MATCHES,
    MAX_PAIRS,
    MAX_REMOVED,
    check_range,
)
from imagemesh_runtime.registry import choose_backend
from imagemesh_runtime.tensors import Array, from_proto, to_proto
from imagemesh_services.vit.backend import Pooling
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.clustering import Clustering, Sample, centres_of
from imagemesh_services.vit.search.folder import check_name
from imagemesh_services.vit.search.store import STORES, IndexSpec, Pair, VectorStore

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_MATCHES: Final = 10
DEFAULT_PAIRS: Final = 1000
DEFAULT_DUPLICATE: Final = 0.95
DEFAULT_CLUSTERS: Final = 8
MAX_CLUSTER_SEED: Final = 2**31 - 1
_TOLD: Final = 4096  # pictures of a message

_POOLINGS: Final = {vit.POOLING_UNSPECIFIED: None, vit.POOLING_CLS: Pooling.CLS, vit.POOLING_MEAN: Pooling.MEAN}
_NUMBERS: Final = {pooling: number for number, pooling in _POOLINGS.items()}

Embed = Callable[[vit.EmbedImagesRequest], Awaitable[vit.EmbedImagesResponse]]


class SearchServicer(rpc.SearchServiceServicer):
    """Embeds as any caller would, in the batches of all; the store has a thread of its own, where calls take turns.

    Args:
        cards: the models that there are, by name; reads the disk.
        embed: the service's own EmbedImages.
    """

    def __init__(self, config: VitConfig, cards: Callable[[], Mapping[str, Any]], embed: Embed) -> None:
        self._config = config
        self._cards = cards
        self._embed = embed
        self._store: VectorStore | None = None
        self._pending = 0
        self._clustering = asyncio.Lock()  # one at a time: it takes all cores, and memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def close(self) -> None:
        """Drop what waits; what is under way ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def IndexImages(self, request: pb.IndexImagesRequest, context: Any) -> pb.IndexImagesResponse:
        check_name(request.index)
        check_range("images", len(request.images), 1, MAX_IMAGES)
        _check_ids(request.ids, len(request.images))
        if request.pooling not in _POOLINGS:
            raise InvalidArgument("pooling", request.pooling, f"one of {', '.join(vit.Pooling.keys())}")
        known = await self._known(request.index)
        if known is None:
            model, pooling = await self._model_of_new(request), _POOLINGS[request.pooling]
        else:
            _check_own(known, request)
            model, pooling = known.model, known.pooling
        vectors = await self._vectors(model, pooling, request.images)
        _check_width(known, vectors)
        spec = known or IndexSpec(request.index, model, pooling, vectors.shape[1])
        replaced = await self._run(lambda store: store.put(spec, list(request.ids), vectors))
        return pb.IndexImagesResponse(index=await self._info(request.index), replaced=replaced)

    async def SearchImages(self, request: pb.SearchImagesRequest, context: Any) -> pb.SearchImagesResponse:
        check_name(request.index)
        check_range("images", len(request.images), 1, MAX_IMAGES)
        check_range("top_k", request.top_k, 0, MAX_MATCHES)
        least = request.min_similarity if request.HasField("min_similarity") else -1.0
        check_range("min_similarity", least, -1, 1)
        spec = await self._spec(request.index)
        vectors = await self._vectors(spec.model, spec.pooling, request.images)
        _check_width(spec, vectors)
        k = request.top_k or DEFAULT_MATCHES
        rows = await self._run(lambda store: store.search(request.index, vectors, k))
        results = [
            pb.SearchResult(matches=[pb.Match(id=hit.id, similarity=hit.similarity) for hit in row if hit[1] >= least])
            for row in rows
        ]
        return pb.SearchImagesResponse(results=results, index=await self._info(request.index))

    async def FindDuplicates(self, request: pb.FindDuplicatesRequest, context: Any) -> pb.FindDuplicatesResponse:
        check_name(request.index)
        check_range("limit", request.limit, 0, MAX_PAIRS)
        check_range("min_similarity", request.min_similarity, 0, 1)
        least, limit = request.min_similarity or DEFAULT_DUPLICATE, request.limit or DEFAULT_PAIRS
        await self._spec(request.index)
        found: list[Pair] = []
        async with aclosing(self._pieces(lambda store: store.similar_pairs(request.index, least))) as pieces:
            async for piece in pieces:
                found += piece
                if len(found) > limit:
                    break
        pairs = heapq.nsmallest(limit, found, key=lambda pair: (-pair.similarity, pair.first, pair.second))
        told = [pb.DuplicatePair(first_id=one.first, second_id=one.second, similarity=one.similarity) for one in pairs]
        return pb.FindDuplicatesResponse(pairs=told, truncated=len(found) > limit)

    async def ListIndexes(self, request: pb.ListIndexesRequest, context: Any) -> pb.ListIndexesResponse:
        names = sorted(await self._run(lambda store: store.specs()))
        found = []
        for name in names:
            try:
                found.append(await self._info(name))
            except NotFound:  # deleted since
                continue
        return pb.ListIndexesResponse(indexes=found)

    async def RemoveImages(self, request: pb.RemoveImagesRequest, context: Any) -> pb.RemoveImagesResponse:
        check_name(request.index)
        check_range("ids", len(request.ids), 1, MAX_REMOVED)
        removed = await self._run(lambda store: store.remove(request.index, list(request.ids)))
        return pb.RemoveImagesResponse(index=await self._info(request.index), removed=removed)

    async def DeleteIndex(self, request: pb.DeleteIndexRequest, context: Any) -> pb.DeleteIndexResponse:
        check_name(request.index)
        await self._run(lambda store: store.delete(request.index))
        return pb.DeleteIndexResponse()

    async def ExportVectors(
        self, request: pb.ExportVectorsRequest, context: Any
    ) -> AsyncIterator[pb.ExportVectorsResponse]:
        check_name(request.index)
        yield pb.ExportVectorsResponse(index=await self._info(request.index))
        async with aclosing(self._pieces(lambda store: store.vectors(request.index))) as pieces:
            async for ids, vectors in pieces:
                yield pb.ExportVectorsResponse(ids=ids, vectors=to_proto(vectors))

    async def ClusterImages(
        self, request: pb.ClusterImagesRequest, context: Any
    ) -> AsyncIterator[pb.ClusterImagesResponse]:
        check_name(request.index)
        check_range("clusters", request.clusters, 0, MAX_CLUSTERS)
        check_range("seed", request.seed, 0, MAX_CLUSTER_SEED)
        groups, count = request.clusters or DEFAULT_CLUSTERS, (await self._info(request.index)).count
        if groups > count:
            raise InvalidArgument("clusters", groups, f"at most {count}, the pictures of index {request.index}")
        async with self._clustering:
            clustering = await self._clustered(request.index, groups, request.seed)
        yield pb.ClusterImagesResponse(
            clusters=[
                pb.ImageCluster(count=one.count, example_id=one.example, mean_similarity=one.mean_similarity)
                for one in clustering.groups
            ]
        )
        for piece in clustering.pieces(_TOLD):
            yield pb.ClusterImagesResponse(
                images=[pb.ClusteredImage(id=one, cluster=group, similarity=cosine) for one, group, cosine in piece]
            )

    async def _clustered(self, name: str, groups: int, seed: int) -> Clustering:
        """Two passes over the index; what is worked out is not on the store's thread, which others use meanwhile."""
        sample, clustering = Sample(groups, seed), Clustering()
        async with aclosing(self._pieces(lambda store: store.vectors(name))) as pieces:
            async for ids, vectors in pieces:
                await asyncio.to_thread(sample.add, ids, vectors)
        centres = await asyncio.to_thread(centres_of, sample, groups, seed)
        async with aclosing(self._pieces(lambda store: store.vectors(name))) as pieces:
            async for ids, vectors in pieces:
                await asyncio.to_thread(clustering.add, ids, vectors, centres)
        await asyncio.to_thread(clustering.order)
        return clustering

    async def _pieces(self, begin: Callable[[VectorStore], Iterator[T]]) -> AsyncGenerator[T, None]:
        """What the store tells in pieces: who searches meanwhile waits for a piece, and not for all."""
        pieces = await self._run(begin)
        while (piece := await self._run(lambda _: next(pieces, None))) is not None:
            yield piece

    async def _run(self, work: Callable[[VectorStore], T]) -> T:
        """The result of ``work``, done on the store's thread."""
        if self._pending >= self._config.max_queue:
            raise Overloaded("search", self._config.max_queue, 1.0)
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._opened()))
        finally:
            self._pending -= 1

    def _opened(self) -> VectorStore:
        """The store, whose library and folder nobody needs who does not search."""
        if self._store is None:
            try:
                self._store = choose_backend(STORES, self._config.index_store)(self._config)
            except OSError as error:
                log.warning("search cannot keep its indexes: %s", error)
                raise FailedPrecondition(
                    "the folder of index_root cannot be made; the service's log says why"
                ) from error
        return self._store

    async def _spec(self, name: str) -> IndexSpec:
        return await self._run(lambda store: store.spec(name))

    async def _known(self, name: str) -> IndexSpec | None:
        """As ``_spec``, of one that may be about to be made."""
        try:
            return await self._spec(name)
        except NotFound:
            return None

    async def _info(self, name: str) -> pb.IndexInfo:
        spec = await self._spec(name)
        count = await self._run(lambda store: store.count(name))
        return pb.IndexInfo(
            name=name, model=spec.model, pooling=_NUMBERS[spec.pooling], width=spec.width, count=count,
            store=self._store.name if self._store is not None else "",
        )  # fmt: skip

    async def _model_of_new(self, request: pb.IndexImagesRequest) -> str:
        if request.model or request.default_model:
            return request.model or request.default_model
        names = sorted(await asyncio.to_thread(self._cards))  # it reads the disk
        if not names:
            raise FailedPrecondition("there is no model to make vectors with")
        return names[0]

    async def _vectors(self, model: str, pooling: Pooling | None, images: Sequence[image_pb2.Image]) -> Array:
        """Unit vectors, float32 [images, width]."""
        asked = vit.EmbedImagesRequest(model=model, images=images, pooling=_NUMBERS[pooling], normalize=True)
        vectors = from_proto((await self._embed(asked)).embeddings, "embeddings", dtypes=["float32"])
        if not np.isfinite(vectors).all():
            raise NotFinite(model, "embeddings")
        return vectors


def _check_ids(ids: Sequence[str], images: int) -> None:
    if len(ids) != images:
        raise InvalidArgument("ids", f"{len(ids)} ids", f"as many as images, {images}")
    for i, one in enumerate(ids):
        if not 1 <= len(one) <= MAX_ID_CHARACTERS or not _printable(one):
            raise InvalidArgument(f"ids[{i}]", one, f"1 to {MAX_ID_CHARACTERS} characters, none of control")
    if len(set(ids)) != len(ids):
        twice = next(one for i, one in enumerate(ids) if one in ids[:i])
        raise InvalidArgument("ids", twice, "all different")


def _printable(text: Iterable[str]) -> bool:
    return all(" " <= one != "\x7f" for one in text)


def _check_own(known: IndexSpec, request: pb.IndexImagesRequest) -> None:
    """Vectors of several models can't be compared."""
    if request.model not in ("", known.model):
        raise InvalidArgument("model", request.model, f"empty or {known.model}, which made index {known.name}")
    if request.pooling not in (vit.POOLING_UNSPECIFIED, _NUMBERS[known.pooling]):
        allowed = f"unspecified or {vit.Pooling.Name(_NUMBERS[known.pooling])}, which made index {known.name}"
        raise InvalidArgument("pooling", vit.Pooling.Name(request.pooling), allowed)


def _check_width(known: IndexSpec | None, vectors: Array) -> None:
    if known is not None and vectors.shape[1] != known.width:
        raise FailedPrecondition(
            f"index {known.name} has vectors of width {known.width}, and its model {known.model} now makes "
            f"{vectors.shape[1]}: index the pictures anew"
        )
