"""The embedded index: as exact as brute force, and whole on the disk whenever its writer dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imagemesh.v1 import image_pb2
from imagemesh.v1 import search_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2 as vit
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.folder import check_name, index_root
from imagemesh_services.vit.search.servicer import SearchServicer
from imagemesh_services.vit.search.store import IndexSpec
from imagemesh_services.vit.search.stores import embedded
from imagemesh_services.vit.search.stores.embedded import EmbeddedStore
from tests.support.dying_writer import NEW, OLD, SPEC, names
from tests.support.sizes import ROOT
from tests.support.vectors import unit_vectors


def test_ten_of_ten_are_those_of_brute_force_among_100_000(tmp_path: Path):
    count, width, k = 100_000, 64, 10
    vectors, asked = unit_vectors(count, width), unit_vectors(50, width, seed=1)
    store = EmbeddedStore(VitConfig(index_root=str(tmp_path)))
    store.put(IndexSpec("all", "vit", None, width), [str(i) for i in range(count)], vectors)
    again = EmbeddedStore(VitConfig(index_root=str(tmp_path)))
    found = [{int(hit.id) for hit in row} for row in again.search("all", asked, k)]
    best = np.argpartition(-(asked @ vectors.T), k, axis=1)[:, :k]
    recall = np.mean([len(row & set(true.tolist())) / k for row, true in zip(found, best, strict=True)])
    assert recall >= 0.99


def test_of_pictures_that_are_all_alike_few_pairs_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded, "_BLOCK", 4)
    monkeypatch.setattr(embedded, "_ACROSS", 8, raising=False)
    store, count = EmbeddedStore(VitConfig(index_root=str(tmp_path))), 42
    store.put(SPEC, [str(i) for i in range(count)], np.repeat(unit_vectors(1, SPEC.width), count, axis=0))
    pieces = list(store.similar_pairs(SPEC.name, 0.999))
    assert max(map(len, pieces)) <= 4 * 8
    assert sorted({pair[:2] for piece in pieces for pair in piece}) == sorted(
        tuple(sorted((str(i), str(j)))) for i in range(count) for j in range(i)
    )
    assert sum(map(len, pieces)) == count * (count - 1) // 2


async def test_indexing_into_an_index_that_is_there_asks_for_that_one_alone(tmp_path: Path):
    async def embed(request: vit.EmbedImagesRequest) -> vit.EmbedImagesResponse:
        return vit.EmbedImagesResponse(embeddings=to_proto(unit_vectors(len(request.images), SPEC.width)))

    config = VitConfig(index_root=str(tmp_path))
    EmbeddedStore(config).put(SPEC, ["old"], unit_vectors(1, SPEC.width))
    servicer = SearchServicer(config, lambda: {SPEC.model: None}, embed)
    servicer._store = store = EmbeddedStore(config)
    store.specs = lambda: pytest.fail("all indexes were asked for")
    try:
        request = pb.IndexImagesRequest(index=SPEC.name, ids=["new"], images=[image_pb2.Image()])
        assert (await servicer.IndexImages(request, None)).index.count == 2
    finally:
        await servicer.close()


# Where a put may die: the new file and its folder are synced, then what points at it, its folder and the root.
STEPS = ("write:1", *(f"fsync:{i}" for i in range(1, 6)), "replace:1", "replaced:1", "unlink:1")


@pytest.mark.parametrize("there", [True, False], ids=["grown", "new"])
def test_a_writer_that_is_killed_leaves_the_old_index_or_the_new_one(tmp_path: Path, there: bool):
    configs = {step: VitConfig(index_root=str(tmp_path / step.replace(":", "-"))) for step in STEPS}
    old = unit_vectors(OLD, SPEC.width) if there else None
    for config in configs.values():
        store = EmbeddedStore(config)
        if old is not None:
            store.put(SPEC, names(0, OLD), old)
    ended = _write_and_die(tmp_path)
    # A new index has nothing to sweep away.
    assert {step: number for step, number in ended.items() if number != signal.SIGKILL} == (
        {} if there else {"unlink:1": 0}
    )
    left = {step: _left(config, old) for step, config in configs.items()}
    before = (
        "write:1",
        "fsync:1",
        "fsync:2",
        "fsync:3",
        "replace:1",
    )  # half a file counts for nothing, nor a whole one
    assert left == {step: "old" if step in before else "new" for step in STEPS}


def _write_and_die(folder: Path) -> dict[str, int]:
    writer = [sys.executable, "-m", "tests.support.dying_writer", str(folder), *STEPS]
    done = subprocess.run(writer, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _left(config: VitConfig, old: np.ndarray | None) -> str:
    """Which index is there; it must be whole, and go on taking pictures."""
    store = EmbeddedStore(config)
    new = unit_vectors(NEW, SPEC.width, seed=1)
    count = store.count("photos") if "photos" in store.specs() else 0
    before = 0 if old is None else OLD
    assert count in (before, before + NEW)
    everything = new if old is None else np.concatenate([old, new])
    start = OLD if old is None else 0
    if count:
        hits = store.search("photos", everything[:count], 1)
        assert [row[0].id for row in hits] == names(start, count)
    assert store.put(SPEC, names(OLD, NEW), new) == count - before
    assert store.count("photos") == before + NEW
    left = {path.name for path in (Path(config.index_root) / "photos").iterdir()}
    assert len([name for name in left if name.endswith(".npz")]) + 1 == len(left)  # no rubbish stays
    return "old" if count == before else "new"


def test_files_stay_few_however_often_pictures_come(tmp_path: Path):
    store = EmbeddedStore(VitConfig(index_root=str(tmp_path)))
    for i in range(40):
        store.put(SPEC, [str(i)], unit_vectors(1, SPEC.width, seed=i))
    assert len(list((tmp_path / "photos").glob("*.npz"))) <= 6


def test_a_folder_that_is_no_index_hides_no_other(tmp_path: Path):
    store = EmbeddedStore(VitConfig(index_root=str(tmp_path)))
    store.put(SPEC, ["a"], unit_vectors(1, SPEC.width))
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "current.json").write_text("{")
    assert set(store.specs()) == {"photos"}


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "A", "-a", "a" * 65, "a\n", "ä", "a.b", "a\0", "٣"])
def test_a_name_is_never_a_path(name: str):
    with pytest.raises(InvalidArgument, match="index must be"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "0", "my-pictures_2", "a" * 64])
def test_names_that_may_be(name: str):
    assert check_name(name) == name


def test_indexes_lie_in_the_users_state_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert index_root(VitConfig()) == tmp_path / "imagemesh" / "indexes"
    assert index_root(VitConfig(index_root="~/x")) == Path(os.path.expanduser("~/x"))
