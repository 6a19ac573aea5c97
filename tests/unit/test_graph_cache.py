"""Graphs on the disk: made once, made anew when anything differs, whole or not there."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_services.graphs.cache import GRAPH, GraphCache, graphs_folder, hash_of


class Maker:
    """Writes a graph with weights beside it, and counts."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, path: Path) -> None:
        self.made += 1
        path.write_bytes(b"graph")
        path.with_name("weights").write_bytes(b"w" * 1000)


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    return GraphCache(tmp_path / "graphs")


def test_a_graph_is_made_once_and_found_by_others(cache: GraphCache, make: Maker, tmp_path: Path) -> None:
    path = cache.find_or_make("a", make)
    assert path.name == GRAPH
    assert path.read_bytes() == b"graph"
    assert cache.find_or_make("a", make) == GraphCache(tmp_path / "graphs").find_or_make("a", make) == path
    assert make.made == 1
    assert cache.find_or_make("b", make) != path
    assert make.made == 2


def cut(folder: Path) -> None:
    (folder / GRAPH).write_bytes(b"gra")


def turn_a_bit(folder: Path) -> None:
    """Of the weights, which an engine would compute with and not notice."""
    content = bytearray((folder / "weights").read_bytes())
    content[500] ^= 1
    (folder / "weights").write_bytes(content)


def lose_the_weights(folder: Path) -> None:
    (folder / "weights").unlink()


def lose_the_sums(folder: Path) -> None:
    (folder / "sums.json").unlink()


@pytest.mark.parametrize("damage", [cut, turn_a_bit, lose_the_weights, lose_the_sums])
def test_a_damaged_graph_is_made_anew_and_said(
    cache: GraphCache, make: Maker, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = cache.find_or_make("a", make).parent
    damage(folder)
    cache.find_or_make("a", make)
    assert make.made == 2
    assert (folder / "weights").read_bytes() == b"w" * 1000
    assert "damaged" in caplog.text
    cache.find_or_make("a", make)
    assert make.made == 2


def test_a_graph_that_could_not_be_made_leaves_nothing(cache: GraphCache, tmp_path: Path, make: Maker) -> None:
    def fail(path: Path) -> None:
        make(path)
        raise ValueError("no such operator")

    with pytest.raises(ValueError, match="no such operator"):
        cache.find_or_make("a", fail)
    assert list((tmp_path / "graphs").iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_what_is_being_made_is_not(
    cache: GraphCache, tmp_path: Path, make: Maker
) -> None:
    old, new = (tmp_path / "graphs" / f".making-{name}" for name in ("old", "new"))
    for room in (old, new):
        (room / "a").mkdir(parents=True)
    os.utime(old, (0, time.time() - 25 * 3600))
    cache.find_or_make("a", make)
    assert sorted(one.name for one in (tmp_path / "graphs").iterdir()) == [new.name, "a"]


def test_who_is_second_takes_the_first_ones(cache: GraphCache, make: Maker) -> None:
    def write(path: Path) -> None:
        make(path)
        if make.made == 1:  # meanwhile another process makes the same
            cache.find_or_make("a", write)

    assert cache.find_or_make("a", write).read_bytes() == b"graph"
    assert make.made == 2


def test_a_folder_that_can_not_be_written_to_is_named_with_its_setting(tmp_path: Path, make: Maker) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match=r"file/graphs: .*IMAGEMESH_GRAPHS"):
        GraphCache(tmp_path / "file" / "graphs").find_or_make("a", make)


def test_the_folder_is_the_configured_one_or_the_users_caches() -> None:
    assert graphs_folder("/mine", {}) == Path("/mine")
    assert graphs_folder("", {"XDG_CACHE_HOME": "/cache"}) == Path("/cache/imagemesh/graphs")


def test_any_byte_of_the_weights_and_any_mark_makes_another_name(tmp_path: Path) -> None:
    weights = tmp_path / "unet" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(1_000_000))
    before = hash_of([weights.parent], "unet", "1")
    assert hash_of([weights.parent], "unet", "1") == before
    assert hash_of([weights.parent], "unet", "2") != before
    (weights.parent / "README.md").write_text("no weights")
    assert hash_of([weights.parent], "unet", "1") == before
    with weights.open("r+b") as file:
        file.seek(777_777)
        file.write(b"x")
    assert hash_of([weights.parent], "unet", "1") != before
