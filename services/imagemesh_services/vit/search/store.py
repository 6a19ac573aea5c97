"""The seam between search and what keeps the vectors."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.backend import Pooling
from imagemesh_services.vit.config import VitConfig

_NAMESPACE: Final = uuid.UUID("6e0d6a4e-6f0c-4c58-9d0a-0d4f6f3f5a51")


@dataclass(frozen=True)
class IndexSpec:
    """What an index is for its whole life.

    Attributes:
        name: checked by the caller to be no path.
        pooling: None: the model's usual one.
        width: numbers of a vector.
    """

    name: str
    model: str
    pooling: Pooling | None
    width: int


class Hit(NamedTuple):
    """A picture that was found; the cosine is -1 to 1."""

    id: str
    similarity: float


class Pair(NamedTuple):
    """Two pictures that are alike, ``first`` before ``second``."""

    first: str
    second: str
    similarity: float


def spec_fields(spec: IndexSpec) -> dict[str, Any]:
    """What a store writes down of an index, beside its name, as JSON has it."""
    return {"model": spec.model, "pooling": spec.pooling and spec.pooling.value, "width": spec.width}


def spec_of(name: str, fields: Mapping[str, Any]) -> IndexSpec:
    """What ``spec_fields`` was made of.

    Raises:
        KeyError, TypeError, ValueError: it was made of something else.
    """
    pooling = Pooling(fields["pooling"]) if fields["pooling"] else None
    return IndexSpec(name, str(fields["model"]), pooling, int(fields["width"]))


def key_of(id: str) -> str:
    """What a database calls a picture: a UUID of its id, which is nothing but hexadecimal digits and "-"."""
    return str(uuid.uuid5(_NAMESPACE, id))


def as_cosine(product: float) -> float:
    """Of the product of two unit vectors, which rounding may put past the end."""
    return min(max(product, -1.0), 1.0)


def check_room(
    config: VitConfig,
    spec: IndexSpec,
    known: IndexSpec | None,
    count: int,
    more: int,
    others: Callable[[], Mapping[str, IndexSpec]],
) -> None:
    """Check that ``more`` pictures may come to the ``count`` of an index.

    Args:
        known: the index as it is there; None: it is new.
        others: tells all indexes; asked only for a new one.

    Raises:
        FailedPrecondition: there are too many indexes or pictures, or the index has become another.
    """
    if known is None and len(others()) >= config.max_indexes:
        raise FailedPrecondition(f"there are {config.max_indexes} indexes already, as many as max_indexes says")
    if known is not None and known != spec:
        raise FailedPrecondition(f"index {spec.name} was made anew with another model; try again")
    if count + more > config.max_index_entries:
        raise FailedPrecondition(
            f"index {spec.name} holds {count} pictures, and max_index_entries is {config.max_index_entries}"
        )


class VectorStore(Protocol):
    """Indexes of unit vectors by name. Its methods block, and are called on one thread.

    What ``put`` and ``remove`` return has changed on the disk: a process that dies before leaves the index as it was,
    or as it was to be. Methods that name an index which isn't there raise NotFound.
    """

    name: str

    def specs(self) -> Mapping[str, IndexSpec]:
        """The indexes, by name."""

    def spec(self, name: str) -> IndexSpec:
        """The index of that name."""

    def count(self, name: str) -> int:
        """How many pictures an index holds."""

    def put(self, spec: IndexSpec, ids: Sequence[str], vectors: Array) -> int:
        """Put unit vectors, float32 [ids, width], into an index, which is made if need be; how many were replaced.

        Raises:
            FailedPrecondition: there are too many indexes, or too many pictures in this one.
        """

    def remove(self, name: str, ids: Sequence[str]) -> int:
        """Take pictures out; how many there were."""

    def search(self, name: str, vectors: Array, k: int) -> list[list[Hit]]:
        """At most ``k`` of the index for each of the unit vectors, float32 [n, width], the likest first."""

    def vectors(self, name: str) -> Iterator[tuple[list[str], Array]]:
        """All ids with their vectors, float32 [ids, width], in pieces; between two the index may change."""

    def similar_pairs(self, name: str, least: float) -> Iterator[list[Pair]]:
        """All pairs of at least this likeness, each once, in pieces; between two the index may change."""

    def delete(self, name: str) -> None:
        """Delete an index."""


_ROOM = "imagemesh_services.vit.search.stores"
STORES: Final[Mapping[str, BackendEntry]] = {
    "faiss": BackendEntry(f"{_ROOM}.embedded:EmbeddedStore", library="faiss"),
    "qdrant": BackendEntry(f"{_ROOM}.qdrant:QdrantStore", library="qdrant_client", explicit=True),
    "milvus": BackendEntry(f"{_ROOM}.milvus:MilvusStore", library="pymilvus", explicit=True),
}
