"""Embeddings that are kept, since people ask for the same negative prompt again and again."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from prometheus_client import Counter, Gauge

from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array
from imagemesh_services.text_encoder.backend import Encoded


@dataclass(frozen=True)
class Embedded:
    """A text's embeddings, and of how many tokens it is."""

    encoded: Encoded
    tokens: int


class EmbeddingCache:
    """The latest used embeddings, by model, text and options.

    Args:
        max_bytes: of all arrays together; what was used least recently leaves. 0: nothing is kept.
    """

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Embedded] = OrderedDict()
        self._bytes = 0
        lookups = Counter(
            "imagemesh_embedding_cache_lookups", "Texts looked up among the kept embeddings.", ("service", "outcome"),
            registry=metrics.registry,
        )  # fmt: skip
        self._outcomes = {outcome: lookups.labels(metrics.service, outcome) for outcome in ("hit", "miss")}
        self._size = Gauge(
            "imagemesh_embedding_cache_bytes", "Bytes of the kept embeddings.", ("service",), registry=metrics.registry
        ).labels(metrics.service)

    def get(self, key: Hashable) -> Embedded | None:
        """The embeddings under that key, whose arrays are not to be written to; None: they are not here."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        self._outcomes["miss" if found is None else "hit"].inc()
        return found

    def put(self, key: Hashable, embedded: Embedded) -> Embedded:
        """Keep the embeddings, unless they alone are more than there is room for; answers what is kept."""
        size = _bytes(embedded)
        if size > self._max_bytes:
            return embedded
        before = self._kept.pop(key, None)
        self._bytes += size - (_bytes(before) if before is not None else 0)
        self._kept[key] = own = _owned(embedded)
        while self._bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes(oldest)
        self._size.set(self._bytes)
        return own


def _bytes(embedded: Embedded) -> int:
    pooled = embedded.encoded.pooled
    return embedded.encoded.embeds.nbytes + (0 if pooled is None else pooled.nbytes)


def _owned(embedded: Embedded) -> Embedded:
    """Copies: an array that is a part of a batch's would keep the whole of it in memory."""

    def copy(array: Array) -> Array:
        own = array.copy()
        own.flags.writeable = False
        return own

    pooled = embedded.encoded.pooled
    return Embedded(Encoded(copy(embedded.encoded.embeds), None if pooled is None else copy(pooled)), embedded.tokens)
