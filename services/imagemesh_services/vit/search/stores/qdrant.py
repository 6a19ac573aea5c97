"""Qdrant: a collection an index, reached over the network at ``index_url``.

An index's spec is the collection's metadata. A point's number is a UUID of the picture's id, which is its payload.
Every search is an exact one unless ``index_exact`` is off: then it is by Qdrant's HNSW graph.
"""

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from imagemesh_runtime.errors import FailedPrecondition, NotFound, Unavailable
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.store import (
    Hit,
    IndexSpec,
    Pair,
    as_cosine,
    check_room,
    key_of,
    spec_fields,
    spec_of,
)

log = logging.getLogger(__name__)

# In the process itself, and gone with it: for tests.
MEMORY: Final = ":memory:"
_PREFIX: Final = "imagemesh-"
_SECONDS: Final = 60  # for an answer
_PIECE: Final = 512  # vectors that are told at a time
_BLOCK: Final = 64  # vectors whose pairs are looked for at a time
_NEIGHBOURS: Final = 16_384  # of one vector among the pairs: more than a call may ask for


class QdrantStore:
    """Collections whose names begin with "imagemesh-"; services that share a server share their indexes.

    A put is one operation of the server's, which is done whole or not at all; of a new index whose first put fails, an
    empty collection may stay. Several writers at once may pass the bounds by what they write.

    Raises:
        FailedPrecondition: there is no ``index_url``.
    """

    name = "qdrant"

    def __init__(self, config: VitConfig) -> None:
        self._config = config
        self._client = _connected(config)
        # In the process it has no other.
        self._search = None if config.index_url == MEMORY else models.SearchParams(exact=config.index_exact)

    def specs(self) -> Mapping[str, IndexSpec]:
        with _asking():
            names = sorted(one.name for one in self._client.get_collections().collections)
        found: dict[str, IndexSpec] = {}
        for name in (one.removeprefix(_PREFIX) for one in names if one.startswith(_PREFIX)):
            spec = self._known(name)
            if spec is not None:
                found[name] = spec
        return found

    def spec(self, name: str) -> IndexSpec:
        spec = self._known(name)
        if spec is None:
            raise NotFound("index", name, self.specs())
        return spec

    def count(self, name: str) -> int:
        self.spec(name)
        with _asking():
            return self._client.count(_collection(name), exact=True).count

    def put(self, spec: IndexSpec, ids: Sequence[str], vectors: Array) -> int:
        known = self._known(spec.name)
        there = self._there(spec.name, ids) if known else []
        check_room(self._config, spec, known, self.count(spec.name) if known else 0, len(ids) - len(there), self.specs)
        if known is None:
            self._create(spec)
        points = [
            models.PointStruct(id=key_of(one), vector=vector.tolist(), payload={"id": one})
            for one, vector in zip(ids, vectors, strict=True)
        ]
        with _asking():
            self._client.upsert(_collection(spec.name), points, wait=True)
        return len(there)

    def remove(self, name: str, ids: Sequence[str]) -> int:
        self.spec(name)
        there = self._there(name, ids)
        if there:
            with _asking():
                self._client.delete(_collection(name), models.PointIdsList(points=there), wait=True)
        return len(there)

    def search(self, name: str, vectors: Array, k: int) -> list[list[Hit]]:
        self.spec(name)
        return self._nearest(name, vectors.tolist(), k)

    def vectors(self, name: str) -> Iterator[tuple[list[str], Array]]:
        self.spec(name)
        for records in self._scrolled(name, _PIECE):
            yield [_id(one) for one in records], np.array([one.vector for one in records], np.float32)

    def similar_pairs(self, name: str, least: float) -> Iterator[list[Pair]]:
        self.spec(name)
        for records in self._scrolled(name, _BLOCK):
            # Rounding may be against a pair of equals.
            rows = self._nearest(name, [one.vector for one in records], _NEIGHBOURS, least - 1e-6)
            yield [
                Pair(_id(own), hit.id, hit.similarity)
                for own, row in zip(records, rows, strict=True)
                for hit in row
                if _id(own) < hit.id
            ]

    def delete(self, name: str) -> None:
        self.spec(name)
        with _asking():
            self._client.delete_collection(_collection(name))

    def _known(self, name: str) -> IndexSpec | None:
        with _asking():
            if not self._client.collection_exists(_collection(name)):
                return None
            config = self._client.get_collection(_collection(name)).config
        try:
            return spec_of(name, config.metadata or {})
        except (KeyError, TypeError, ValueError) as error:
            log.warning("index %s is left out: its collection's metadata is not ours: %s", name, error)
            return None

    def _create(self, spec: IndexSpec) -> None:
        size = models.VectorParams(size=spec.width, distance=models.Distance.DOT)
        with _asking():
            self._client.create_collection(_collection(spec.name), size, metadata=spec_fields(spec))

    def _there(self, name: str, ids: Sequence[str]) -> list[int | str | uuid.UUID]:
        """The numbers of those of the pictures that there are."""
        numbers = [key_of(one) for one in dict.fromkeys(ids)]
        with _asking():
            found = self._client.retrieve(_collection(name), numbers, with_payload=False)
        return [one.id for one in found]

    def _nearest(self, name: str, vectors: Sequence[Any], k: int, least: float | None = None) -> list[list[Hit]]:
        requests = [
            models.QueryRequest(query=one, limit=k, params=self._search, with_payload=True, score_threshold=least)
            for one in vectors
        ]
        with _asking():
            answers = self._client.query_batch_points(_collection(name), requests)
        return [[Hit(_id(one), as_cosine(one.score)) for one in answer.points] for answer in answers]

    def _scrolled(self, name: str, size: int) -> Iterator[list[models.Record]]:
        offset: Any = None
        while True:
            with _asking():
                records, offset = self._client.scroll(
                    _collection(name), limit=size, offset=offset, with_payload=True, with_vectors=True
                )
            if records:
                yield records
            if offset is None:
                return


def _connected(config: VitConfig) -> QdrantClient:
    if config.index_url == MEMORY:
        return QdrantClient(location=MEMORY)
    if not config.index_url:
        raise FailedPrecondition("index_store qdrant needs index_url, such as http://qdrant:6333")
    try:
        return QdrantClient(
            url=config.index_url, api_key=config.index_token or None, timeout=_SECONDS, check_compatibility=False
        )
    except ValueError as error:
        raise FailedPrecondition(f"index_url {config.index_url} is no address of Qdrant's: {error}") from error


@contextmanager
def _asking() -> Iterator[None]:
    """Around calls of the client: what goes wrong there becomes an error of ours."""
    try:
        yield
    except UnexpectedResponse as error:
        log.warning("qdrant answered %s: %s", error.status_code, error.content[:500])
        raise Unavailable("qdrant", f"answered {error.status_code} {error.reason_phrase}") from error
    except ApiException as error:
        log.warning("qdrant cannot be reached: %s", error)
        raise Unavailable("qdrant", "cannot be reached") from error


def _collection(name: str) -> str:
    return f"{_PREFIX}{name}"


def _id(record: models.Record | models.ScoredPoint) -> str:
    return str((record.payload or {})["id"])
