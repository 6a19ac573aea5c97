"""What every store of vectors promises at its seam."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from milvus_lite.server_manager import server_manager_instance

from imagemesh_runtime.errors import FailedPrecondition, NotFound
from imagemesh_runtime.registry import choose_backend
from imagemesh_services.vit.backend import Pooling
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.store import STORES, IndexSpec, VectorStore
from tests.support.qdrant_server import QdrantServer, qdrant_server
from tests.support.vectors import unit_vectors

# The tests' own server has no TLS.
pytestmark = pytest.mark.filterwarnings("ignore:Api key is used")

SPEC = IndexSpec("photos", "vit", Pooling.CLS, 8)


@pytest.fixture(scope="module")
def qdrant() -> Iterator[QdrantServer]:
    with qdrant_server() as server:
        yield server


@pytest.fixture(params=STORES)
def config(request: pytest.FixtureRequest, tmp_path: Path, qdrant: QdrantServer) -> Iterator[VitConfig]:
    qdrant.empty()
    where = {"index_url": qdrant.url, "index_token": qdrant.token} if request.param == "qdrant" else {}
    yield VitConfig(
        index_root=str(tmp_path / "indexes"), index_store=request.param, max_indexes=2, max_index_entries=50, **where
    )
    server_manager_instance.release_all()  # Milvus Lite's, which would go on until the process ends


def opened(config: VitConfig) -> VectorStore:
    return choose_backend(STORES, config.index_store)(config)


@pytest.fixture
def store(config: VitConfig) -> VectorStore:
    return opened(config)


def test_ten_of_ten_are_those_of_brute_force(config):
    count, width, k = 3000, 32, 10
    vectors, asked = unit_vectors(count, width), unit_vectors(30, width, seed=1)
    store = opened(replace(config, max_index_entries=count))
    spec = IndexSpec("all", "vit", None, width)
    for start in range(0, count, 1000):
        store.put(spec, [str(i) for i in range(start, start + 1000)], vectors[start : start + 1000])
    found = [{int(hit.id) for hit in row} for row in store.search("all", asked, k)]
    best = np.argpartition(-(asked @ vectors.T), k, axis=1)[:, :k]
    recall = np.mean([len(row & set(true.tolist())) / k for row, true in zip(found, best, strict=True)])
    assert recall >= 0.99


def test_what_was_put_is_found_the_likest_first(store):
    vectors = unit_vectors(40, 8)
    ids = [str(i) for i in range(40)]
    assert store.put(SPEC, ids, vectors) == 0
    hits = store.search("photos", vectors[:3], 5)
    assert [row[0].id for row in hits] == ["0", "1", "2"]
    for vector, row in zip(vectors, hits, strict=False):
        expected = np.sort(vectors @ vector)[::-1][:5]
        np.testing.assert_allclose([hit.similarity for hit in row], expected, atol=1e-6)
        assert all(-1 <= hit.similarity <= 1 for hit in row)


def test_ids_may_have_any_character(store):
    ids = ["it's", 'said "so"', "a\\b", "é☃🦊" * 128, "%_*", "1", "['x']", " "]
    vectors = unit_vectors(len(ids), 8)
    store.put(SPEC, ids, vectors)
    assert [row[0].id for row in store.search("photos", vectors, 1)] == ids
    assert store.put(SPEC, ids[:2], vectors[:2]) == 2
    assert store.remove("photos", ids[:4]) == 4
    assert store.count("photos") == len(ids) - 4


def test_names_may_have_what_names_may_have(store):
    specs = {name: IndexSpec(name, "vit", None, 8) for name in ("a_b-c__d-_", "0-d_d")}
    for spec in specs.values():
        store.put(spec, ["a"], unit_vectors(1, 8))
    assert store.specs() == specs


def test_asking_for_more_than_there_is_gives_all(store):
    store.put(SPEC, ["a", "b"], unit_vectors(2, 8))
    assert len(store.search("photos", unit_vectors(1, 8), 10)[0]) == 2


def test_an_id_that_is_there_is_replaced(store):
    first, second = unit_vectors(2, 8), unit_vectors(2, 8, seed=1)
    store.put(SPEC, ["a", "b"], first)
    assert store.put(SPEC, ["b", "c"], second) == 1
    assert store.count("photos") == 3
    assert store.search("photos", second[:1], 1)[0][0] == ("b", pytest.approx(1, abs=1e-6))


def test_what_was_removed_is_not_found_and_may_come_again(store):
    vectors = unit_vectors(3, 8)
    store.put(SPEC, ["a", "b", "c"], vectors)
    assert store.remove("photos", ["b", "b", "x"]) == 1
    assert {hit.id for hit in store.search("photos", vectors[1:2], 3)[0]} == {"a", "c"}
    store.put(SPEC, ["b"], vectors[1:2])
    assert store.search("photos", vectors[1:2], 1)[0][0].id == "b"


def test_an_emptied_index_is_still_there(store):
    store.put(SPEC, ["a"], unit_vectors(1, 8))
    store.remove("photos", ["a"])
    assert store.search("photos", unit_vectors(1, 8), 3) == [[]]
    assert store.count("photos") == 0


def test_all_of_it_is_there_again_after_any_history(config):
    random = np.random.default_rng(3)
    kept: dict[str, np.ndarray] = {}
    store = opened(config)
    for turn in range(40):
        ids = [str(i) for i in random.choice(30, random.integers(1, 6), replace=False)]
        if turn and random.random() < 0.3:
            store.remove("photos", ids)
            for one in ids:
                kept.pop(one, None)
        else:
            vectors = unit_vectors(len(ids), 8, seed=100 + turn)
            store.put(SPEC, ids, vectors)
            kept |= dict(zip(ids, vectors, strict=True))
    again = opened(config)
    assert again.specs() == {"photos": SPEC}
    for one in (store, again):
        assert one.count("photos") == len(kept)
        for name, vector in kept.items():
            assert one.search("photos", vector[None], 1)[0][0] == (name, pytest.approx(1, abs=1e-6))


def test_what_another_process_changes_is_seen(config):
    ours, theirs = opened(config), opened(config)
    vectors = unit_vectors(3, 8)
    ours.put(SPEC, ["a"], vectors[:1])
    theirs.put(SPEC, ["b"], vectors[1:2])
    ours.put(SPEC, ["c"], vectors[2:])
    assert [len(one.search("photos", vectors, 5)[0]) for one in (ours, theirs)] == [3, 3]
    theirs.delete("photos")
    with pytest.raises(NotFound, match="photos"):
        ours.search("photos", vectors, 1)


def test_near_duplicates_are_told_once_each(store):
    vectors = unit_vectors(40, 8)
    near = vectors[:2] + 0.01 * unit_vectors(2, 8, seed=9)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    store.put(SPEC, [f"{i:02}" for i in range(40)], vectors)
    store.put(SPEC, ["00 again", "01 again", "02 again"], np.concatenate([near, vectors[2:3]]))
    pairs = [pair for piece in store.similar_pairs("photos", 0.999) for pair in piece]
    assert sorted(pair[:2] for pair in pairs) == [("00", "00 again"), ("01", "01 again"), ("02", "02 again")]
    everything = np.concatenate([vectors, near, vectors[2:3]])
    alike = np.triu(everything @ everything.T >= 0.5, 1).sum()
    assert sum(map(len, store.similar_pairs("photos", 0.5))) == alike


def test_all_vectors_are_told_as_they_were_put(store):
    vectors = unit_vectors(40, 8)
    store.put(SPEC, [str(i) for i in range(40)], vectors)
    store.remove("photos", ["3"])
    told: dict[str, np.ndarray] = {}
    for ids, piece in store.vectors("photos"):
        assert piece.dtype == np.float32
        told |= dict(zip(ids, piece, strict=True))
    assert sorted(told, key=int) == [str(i) for i in range(40) if i != 3]
    np.testing.assert_allclose([told[one] for one in told], vectors[[int(one) for one in told]], atol=1e-6)
    store.remove("photos", list(told))
    assert list(store.vectors("photos")) == []


def test_a_deleted_index_is_gone_and_another_may_have_its_name(store):
    store.put(SPEC, ["a"], unit_vectors(1, 8))
    store.delete("photos")
    assert store.specs() == {}
    wider = IndexSpec("photos", "other", None, 4)
    store.put(wider, ["a"], unit_vectors(1, 4))
    assert store.specs() == {"photos": wider}


def test_an_unknown_index_is_not_found(store):
    store.put(SPEC, ["a"], unit_vectors(1, 8))
    for call in (
        lambda: store.spec("x"),
        lambda: store.count("x"),
        lambda: store.delete("x"),
        lambda: store.remove("x", ["a"]),
    ):
        with pytest.raises(NotFound, match="available: photos"):
            call()


def test_bounds_hold_and_leave_the_index_as_it_was(store):
    store.put(SPEC, ["a"], unit_vectors(1, 8))
    with pytest.raises(FailedPrecondition, match="max_index_entries is 50"):
        store.put(SPEC, [str(i) for i in range(50)], unit_vectors(50, 8))
    store.put(IndexSpec("second", "vit", None, 8), ["a"], unit_vectors(1, 8))
    with pytest.raises(FailedPrecondition, match="max_indexes"):
        store.put(IndexSpec("third", "vit", None, 8), ["a"], unit_vectors(1, 8))
    assert (store.count("photos"), sorted(store.specs())) == (1, ["photos", "second"])


def test_vectors_of_another_model_do_not_get_in(store):
    store.put(SPEC, ["a"], unit_vectors(1, 8))
    with pytest.raises(FailedPrecondition, match="another model"):
        store.put(IndexSpec("photos", "vit", Pooling.MEAN, 8), ["b"], unit_vectors(1, 8))
    assert store.count("photos") == 1
