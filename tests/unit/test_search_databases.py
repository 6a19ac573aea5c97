"""Search over a database that isn't there, or isn't told of."""

import signal
import subprocess
import sys
from dataclasses import replace

import grpc
import pytest
from qdrant_client import models

from imagemesh_runtime.errors import FailedPrecondition, NotFound, Unavailable
from imagemesh_runtime.registry import choose_backend
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.store import STORES
from imagemesh_services.vit.search.stores import milvus
from imagemesh_services.vit.search.stores.qdrant import QdrantStore
from tests.support.putting_milvus import SIZE, SPEC
from tests.support.qdrant_server import qdrant_server
from tests.support.sizes import ROOT
from tests.support.vectors import unit_vectors

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:Api key is used")]


def test_a_database_is_never_picked_by_itself():
    assert choose_backend(STORES, "auto").name == "faiss"


def test_qdrant_wants_an_address():
    with pytest.raises(FailedPrecondition, match="index_url"):
        QdrantStore(VitConfig())
    with pytest.raises(FailedPrecondition, match="index_url"):
        QdrantStore(VitConfig(index_url="http://[::1"))


def test_qdrant_that_cannot_be_reached_is_unavailable():
    with pytest.raises(Unavailable, match="qdrant: cannot be reached"):
        QdrantStore(VitConfig(index_url="http://127.0.0.1:1")).specs()


def test_qdrant_that_refuses_us_is_said():
    with qdrant_server() as server, pytest.raises(Unavailable, match="qdrant: answered 403"):
        QdrantStore(VitConfig(index_url=server.url, index_token="another")).specs()


def test_collections_of_others_are_left_alone():
    with qdrant_server() as server:
        for name in ("other", "imagemesh-other"):
            server.client.create_collection(name, models.VectorParams(size=2, distance=models.Distance.DOT))
        store = QdrantStore(VitConfig(index_url=server.url, index_token=server.token))
        store.put(SPEC, ["a"], unit_vectors(1, SPEC.width))
        assert store.specs() == {SPEC.name: SPEC}
        with pytest.raises(NotFound):
            store.delete("other")
        with pytest.raises(Unavailable, match="answered 409"):
            store.put(replace(SPEC, name="other"), ["a"], unit_vectors(1, SPEC.width))


def test_milvus_that_cannot_be_reached_is_unavailable(monkeypatch):
    monkeypatch.setattr(milvus, "_SECONDS", 0.5)
    with pytest.raises(Unavailable, match="milvus: cannot be reached"):
        milvus.MilvusStore(VitConfig(index_url="http://127.0.0.1:1")).specs()


class Bounded:
    """A client of Milvus that refuses calls without a bound; ``failing``, all of them."""

    def __init__(self, client):
        self.client, self.failing, self.called = client, False, set()

    def __getattr__(self, name):
        def call(*args, timeout, **options):
            assert timeout == milvus._SECONDS
            self.called.add(name)
            if self.failing:
                raise grpc.RpcError("deadline exceeded")
            return getattr(self.client, name)(*args, timeout=timeout, **options)

        return call


def test_every_call_of_milvus_is_bounded_and_what_breaks_below_it_is_unavailable(tmp_path):
    store = milvus.MilvusStore(VitConfig(index_root=str(tmp_path)))
    store._client = client = Bounded(store._client)
    store.put(SPEC, ["a", "b"], unit_vectors(2, SPEC.width))
    assert store.specs() == {SPEC.name: SPEC}
    assert store.count(SPEC.name) == 2
    assert len(store.search(SPEC.name, unit_vectors(1, SPEC.width), 2)[0]) == 2
    assert sum(len(ids) for ids, _ in store.vectors(SPEC.name)) == 2
    assert store.remove(SPEC.name, ["a"]) == 1
    store.delete(SPEC.name)
    assert client.called >= {"list_collections", "upsert", "search", "query", "query_iterator", "drop_collection"}
    client.failing = True
    with pytest.raises(Unavailable, match="milvus"):
        store.specs()


def test_milvus_lite_keeps_whole_puts_however_its_process_ends(tmp_path):
    command = [sys.executable, "-m", "tests.support.putting_milvus", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True) as process:
        try:
            told = [int(process.stdout.readline()) for _ in range(5)]
        finally:
            process.send_signal(signal.SIGKILL)
    store = milvus.MilvusStore(VitConfig(index_root=str(tmp_path)))
    count = store.count("photos")
    assert (count % SIZE, count >= told[-1]) == (0, True)
    ids = {one for piece, _ in store.vectors("photos") for one in piece}
    assert ids == {f"{turn}-{i}" for turn in range(count // SIZE) for i in range(SIZE)}
    vector = unit_vectors(SIZE, SPEC.width, seed=2)[7:8]
    assert store.search("photos", vector, 1)[0][0] == ("2-7", pytest.approx(1, abs=1e-6))


def test_what_lets_us_in_is_not_shown():
    assert "secret" not in repr(VitConfig(index_token="secret"))
