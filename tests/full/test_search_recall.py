"""Each store of vectors finds what brute force finds, among 100,000 random ones, of which none is near another."""

import time
from pathlib import Path

import numpy as np
import pytest

from imagemesh_runtime.registry import choose_backend
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.store import STORES, IndexSpec
from tests.support.vectors import unit_vectors

COUNT, WIDTH, ASKED, K = 100_000, 128, 50, 10
A_PUT = 1000


@pytest.mark.parametrize("name", STORES)
def test_ten_of_ten_are_those_of_brute_force(name: str, tmp_path: Path, figures: dict[str, str]) -> None:
    vectors, asked = unit_vectors(COUNT, WIDTH), unit_vectors(ASKED, WIDTH, seed=1)
    url = ":memory:" if name == "qdrant" else ""
    store = choose_backend(STORES, name)(VitConfig(index_root=str(tmp_path), index_url=url))
    spec = IndexSpec("all", "vit", None, WIDTH)
    began = time.perf_counter()
    for start in range(0, COUNT, A_PUT):
        store.put(spec, [str(i) for i in range(start, start + A_PUT)], vectors[start : start + A_PUT])
    put = time.perf_counter() - began
    found = [{int(hit.id) for hit in row} for row in store.search("all", asked, K)]
    best = np.argpartition(-(asked @ vectors.T), K, axis=1)[:, :K]
    recall = float(np.mean([len(row & set(true.tolist())) / K for row, true in zip(found, best, strict=True)]))
    figures[f"{name}: recall@10"] = f"{recall:.4f} of {COUNT:,} vectors of width {WIDTH}, put in {put:.0f} s"
    assert recall >= 0.99
