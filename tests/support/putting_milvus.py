"""``python -m tests.support.putting_milvus FOLDER``: put SIZE pictures after SIZE others into FOLDER's index "photos"
over Milvus Lite, and print after each put how many there have been, until somebody kills this."""

import sys

from imagemesh_services.vit.backend import Pooling
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.store import IndexSpec
from imagemesh_services.vit.search.stores.milvus import MilvusStore
from tests.support.vectors import unit_vectors

SPEC = IndexSpec("photos", "vit", Pooling.CLS, 16)
SIZE = 64
MOST = 1000


def main() -> None:
    """See the module."""
    store = MilvusStore(VitConfig(index_root=sys.argv[1]))
    for turn in range(MOST):
        ids = [f"{turn}-{i}" for i in range(SIZE)]
        store.put(SPEC, ids, unit_vectors(SIZE, SPEC.width, seed=turn))
        print((turn + 1) * SIZE, flush=True)


if __name__ == "__main__":
    main()
