"""The seam between search and what keeps the vectors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.backend import Pooling


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
}
