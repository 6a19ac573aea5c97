"""Milvus: a collection an index, reached at ``index_url``; without one Milvus Lite, in this process over files.

An index's spec is a property of the collection. A row's key is a UUID of the picture's id: pymilvus puts keys into the
text of expressions as they are. Every search is an exact one (an index "FLAT") unless ``index_exact`` was off when the
index was made: then it is by Milvus' own choice of a graph.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from imagemesh_runtime.errors import NotFound, Unavailable
from imagemesh_runtime.limits import MAX_ID_CHARACTERS
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.folder import index_root
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

_PREFIX: Final = "imagemesh_"
_PROPERTY: Final = "imagemesh"
_SECONDS: Final = 60  # for an answer; told with each call, since the client's own is for connecting alone
_PIECE: Final = 512  # vectors that are told at a time
_BLOCK: Final = 64  # vectors whose pairs are looked for at a time
_NEIGHBOURS: Final = 16_384  # the most that Milvus tells of one vector, and more than a call may ask for
_KEY_CHARACTERS: Final = 36
_BYTES: Final = 4  # of a character in UTF-8, at most


class MilvusStore:
    """Collections whose names begin with "imagemesh_"; services that share a server share their indexes.

    Milvus Lite's files are one process's. A put is one request; of a new index whose first put fails, an empty
    collection may stay. Several writers at once may pass the bounds by what they write.
    """

    name = "milvus"

    def __init__(self, config: VitConfig) -> None:
        self._config = config
        uri = config.index_url
        options: dict[str, bool] = {}
        if not uri:
            # Milvus Lite takes the pings of an idle connection for an attack.
            options = {"grpc.keepalive_permit_without_calls": False}
            root = index_root(config)
            root.mkdir(parents=True, exist_ok=True)
            uri = str(root / "milvus.db")
        with _asking():
            self._client = MilvusClient(uri=uri, token=config.index_token, timeout=_SECONDS, grpc_options=options)
        self._loaded: set[str] = set()

    def specs(self) -> Mapping[str, IndexSpec]:
        with _asking():
            collections = sorted(self._client.list_collections(timeout=_SECONDS))
        names = [_name(one) for one in collections if one.startswith(_PREFIX)]
        return {name: spec for name in names if (spec := self._known(name)) is not None}

    def spec(self, name: str) -> IndexSpec:
        spec = self._known(name)
        if spec is None:
            raise NotFound("index", name, self.specs())
        return spec

    def count(self, name: str) -> int:
        rows = self._query(self._ready(name), "", ["count(*)"])
        return int(rows[0]["count(*)"])

    def put(self, spec: IndexSpec, ids: Sequence[str], vectors: Array) -> int:
        known = self._known(spec.name)
        there = self._there(self._ready(spec.name), ids) if known else []
        check_room(self._config, spec, known, self.count(spec.name) if known else 0, len(ids) - len(there), self.specs)
        if known is None:
            self._create(spec)
        rows = [
            {"key": key_of(one), "id": one, "vector": np.asarray(vector, np.float32)}
            for one, vector in zip(ids, vectors, strict=True)
        ]
        with _asking():
            self._client.upsert(self._ready(spec.name), rows, timeout=_SECONDS)
        return len(there)

    def remove(self, name: str, ids: Sequence[str]) -> int:
        collection = self._ready(name)
        there = self._there(collection, ids)
        if there:
            with _asking():
                self._client.delete(collection, ids=there, timeout=_SECONDS)
        return len(there)

    def search(self, name: str, vectors: Array, k: int) -> list[list[Hit]]:
        return self._nearest(self._ready(name), list(np.asarray(vectors, np.float32)), k, {})

    def vectors(self, name: str) -> Iterator[tuple[list[str], Array]]:
        for rows in self._scrolled(self._ready(name), _PIECE):
            yield [row["id"] for row in rows], np.array([row["vector"] for row in rows], np.float32)

    def similar_pairs(self, name: str, least: float) -> Iterator[list[Pair]]:
        collection = self._ready(name)
        for rows in self._scrolled(collection, _BLOCK):
            # Milvus takes what is more than its radius, and rounding may be against a pair of equals.
            near = self._nearest(collection, [row["vector"] for row in rows], _NEIGHBOURS, {"radius": least - 1e-6})
            yield [
                Pair(own["id"], hit.id, hit.similarity)
                for own, hits in zip(rows, near, strict=True)
                for hit in hits
                if own["id"] < hit.id
            ]

    def delete(self, name: str) -> None:
        collection = self._ready(name)
        with _asking():
            self._client.drop_collection(collection, timeout=_SECONDS)
        self._loaded.discard(collection)

    def _known(self, name: str) -> IndexSpec | None:
        with _asking():
            if not self._client.has_collection(_collection(name), timeout=_SECONDS):
                return None
            properties = self._client.describe_collection(_collection(name), timeout=_SECONDS).get("properties", {})
        try:
            return spec_of(name, json.loads(properties[_PROPERTY]))
        except (KeyError, TypeError, ValueError) as error:
            log.warning("index %s is left out: its collection's properties are not ours: %s", name, error)
            return None

    def _ready(self, name: str) -> str:
        """The index's collection, in the server's memory.

        Raises:
            NotFound: there is none.
        """
        self.spec(name)
        collection = _collection(name)
        if collection not in self._loaded:
            with _asking():
                self._client.load_collection(collection, timeout=_SECONDS)
            self._loaded.add(collection)
        return collection

    def _create(self, spec: IndexSpec) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=_KEY_CHARACTERS)
        schema.add_field("id", DataType.VARCHAR, max_length=MAX_ID_CHARACTERS * _BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=spec.width)
        indexes = MilvusClient.prepare_index_params()
        kind = "FLAT" if self._config.index_exact else "AUTOINDEX"
        indexes.add_index("vector", index_type=kind, metric_type="IP")
        with _asking():
            self._client.create_collection(
                _collection(spec.name), schema=schema, index_params=indexes, consistency_level="Strong",
                properties={_PROPERTY: json.dumps(spec_fields(spec))}, timeout=_SECONDS,
            )  # fmt: skip

    def _there(self, collection: str, ids: Sequence[str]) -> list[str]:
        """The keys of those of the pictures that there are."""
        keys = json.dumps([key_of(one) for one in dict.fromkeys(ids)])
        return [row["key"] for row in self._query(collection, f"key in {keys}", ["key"])]

    def _query(self, collection: str, condition: str, fields: list[str]) -> list[dict[str, Any]]:
        with _asking():
            return list(
                self._client.query(
                    collection, filter=condition, output_fields=fields, consistency_level="Strong", timeout=_SECONDS
                )
            )

    def _nearest(self, collection: str, vectors: list[Any], k: int, params: Mapping[str, Any]) -> list[list[Hit]]:
        with _asking():
            rows = self._client.search(
                collection, data=vectors, limit=k, anns_field="vector", output_fields=["id"],
                search_params={"metric_type": "IP", "params": dict(params)}, consistency_level="Strong",
                timeout=_SECONDS,
            )  # fmt: skip
        return [[Hit(hit["entity"]["id"], as_cosine(hit["distance"])) for hit in row] for row in rows]

    def _scrolled(self, collection: str, size: int) -> Iterator[list[dict[str, Any]]]:
        with _asking():
            pages = self._client.query_iterator(
                collection, batch_size=size, filter="", output_fields=["id", "vector"], consistency_level="Strong",
                timeout=_SECONDS,
            )  # fmt: skip
        try:
            while True:
                with _asking():
                    rows = pages.next()
                if not rows:
                    return
                yield list(rows)
        finally:
            pages.close()


@contextmanager
def _asking() -> Iterator[None]:
    """Around calls of the client: what goes wrong there becomes an error of ours."""
    try:
        yield
    except (MilvusException, grpc.RpcError) as error:
        log.warning("milvus failed: %s", error)
        raise Unavailable("milvus", "cannot be reached, or failed; the service's log says why") from error


def _collection(name: str) -> str:
    """Milvus' names have letters, digits and "_" alone."""
    return _PREFIX + name.replace("_", "__").replace("-", "_d")


def _name(collection: str) -> str:
    return re.sub("_([_d])", lambda match: "-" if match[1] == "d" else "_", collection.removeprefix(_PREFIX))
