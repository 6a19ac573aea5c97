"""Model folders, loading, and the choice of a backend."""

import asyncio
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from imagemesh.v1.model_service_pb2 import ListServedModelsRequest
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import (
    BackendEntry,
    LoadedModels,
    ModelCard,
    ModelFolder,
    Repository,
    cards_of,
    choose_backend,
)
from imagemesh_runtime.service import ModelServicer


def put(root: Path, name: str, marker: str = "config.json", content: str = "{}") -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / marker).write_text(content)


def names(*roots: Path) -> list[str]:
    return sorted(Repository(roots).folders())


def test_models_lie_in_the_root_or_in_a_folder_of_their_maker(tmp_path: Path) -> None:
    put(tmp_path, "vit")
    put(tmp_path, "google/vit-base")
    put(tmp_path, "a/b/c")
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert names(tmp_path) == ["google/vit-base", "vit"]


def test_the_parts_of_a_model_are_no_models(tmp_path: Path) -> None:
    put(tmp_path, "sd", "model_index.json")
    put(tmp_path, "sd/vae")
    put(tmp_path, "vit")
    put(tmp_path, "vit/1_Pooling")  # sorts before config.json
    assert names(tmp_path) == ["sd", "vit"]


def test_hidden_folders_are_no_models(tmp_path: Path) -> None:
    for name in (".cache", ".git/x", "org/.trash"):
        put(tmp_path, name)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["{", "[]", "null", '"text"', "\udcff", "[" * 100_000])
def test_a_broken_model_is_left_out_with_its_parts(tmp_path: Path, content: str) -> None:
    put(tmp_path, "sd", "model_index.json")
    (tmp_path / "sd" / "model_index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    put(tmp_path, "sd/vae")
    put(tmp_path, "good")
    assert names(tmp_path) == ["good"]


def test_the_first_root_wins(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    put(one, "m", content='{"from": 1}')
    put(two, "m", content='{"from": 2}')
    put(two, "n", content='{"from": 2}')
    folders = Repository.parse(f"{one}{os.pathsep}{two}").folders()
    assert {name: folder.config["from"] for name, folder in folders.items()} == {"m": 1, "n": 2}


def test_a_model_that_is_broken_in_the_first_root_comes_from_the_second(tmp_path: Path) -> None:
    put(tmp_path / "one", "m", content="{")
    put(tmp_path / "two", "m", content='{"from": 2}')
    assert Repository([tmp_path / "one", tmp_path / "two"]).folders()["m"].config == {"from": 2}


def test_new_folders_are_seen(tmp_path: Path) -> None:
    repository = Repository([tmp_path])
    assert repository.folders() == {}
    put(tmp_path, "m")
    assert list(repository.folders()) == ["m"]


def test_a_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="models must be a folder that exists, got"):
        Repository.parse(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("value", "has"), [(["diffusers", "AutoencoderKL"], True), ([None, None], False), ([], False), (5, False)]
)
def test_has_tells_a_pipelines_components(tmp_path: Path, value: object, has: bool) -> None:
    folder = ModelFolder("m", tmp_path, json.loads(json.dumps({"vae": value})))
    assert folder.has("vae") is has
    assert not folder.has("unet")


def _described(folder: ModelFolder) -> ModelCard | None:
    """Reads as backends do: a number of a part's config, and the first of a list."""
    if "kind" not in folder.config:
        return None
    width = folder.read("unet", "config.json")["width"] + 0
    return ModelCard(folder.name, {"kind": folder.config["kind"][0], "width": str(width)})


BROKEN = {"absent": None, "torn": "{", "empty": "{}", "no-object": "[]", "no-number": '{"width": "wide"}'}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_folder_that_cannot_be_described_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    for name in ("a", "broken", "c"):
        put(tmp_path, name, "model_index.json", '{"kind": ["sd"]}')
        put(tmp_path, f"{name}/unet", content='{"width": 4}')
    put(tmp_path, "other", "model_index.json")
    (tmp_path / "broken/unet/config.json").unlink()
    if content is not None:
        put(tmp_path, "broken/unet", content=content)
    cards = cards_of(Repository([tmp_path]).folders().values(), _described)
    properties = {"kind": "sd", "width": "4"}
    assert cards == {"a": ModelCard("a", properties), "c": ModelCard("c", properties)}
    assert [("broken" in record.getMessage(), record.levelname) for record in caplog.records] == [(True, "WARNING")]


class Backend:
    """Models "a" and "b" are numbered by their loads; the load waits for ``go`` and fails while told to."""

    name, device, dtype = "numbers", "cpu", "float32"
    repository = Repository([Path("numbers")])

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.fail = False
        self.scanned_on: set[threading.Thread] = set()

    def cards(self) -> Mapping[str, ModelCard]:
        self.scanned_on.add(threading.current_thread())
        return {"a": ModelCard("a"), "b": ModelCard("b")}

    def load(self, name: str) -> int:
        self.asked.append(name)
        self.begun.set()
        self.go.wait(10)
        if self.fail:
            raise OSError("the disk is gone")
        return len(self.asked)


class Several(Backend):
    """Finds "a" at its next look with another engine than at its first."""

    def __init__(self, *engines: Backend) -> None:
        super().__init__()
        self.engines = list(engines)

    def cards(self) -> Mapping[str, ModelCard]:
        return {"a": ModelCard("a", engine=self.engines.pop(0))}

    def load(self, name: str) -> int:
        return self.cards()[name].engine.load(name)


async def test_the_engine_that_is_named_is_the_one_that_loaded(models) -> None:
    first, second = Backend(), Backend()
    for engine in (first, second):
        engine.go.set()
    models.backend = Several(first, second)
    await models.get("a")
    assert (models.engine_of("a"), first.asked, second.asked) == (first, ["a"], [])


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def models(backend: Backend):
    lane = Lane("registry")
    yield LoadedModels(backend, lane, Metrics("test"))
    backend.go.set()
    lane.close()


async def test_concurrent_callers_share_one_load(backend: Backend, models: LoadedModels[int]) -> None:
    tasks = [asyncio.create_task(models.get("a")) for _ in range(5)]
    assert await asyncio.to_thread(backend.begun.wait, 10)
    assert not models.is_loaded("a")
    backend.go.set()
    assert await asyncio.gather(*tasks) == [1] * 5
    assert backend.asked == ["a"]
    assert models.is_loaded("a")
    assert not models.is_loaded("b")


async def test_the_disk_is_read_beside_the_event_loop(backend: Backend, models: LoadedModels[int]) -> None:
    backend.go.set()
    await models.get("a")
    answer = await ModelServicer("numbers", models).ListServedModels(ListServedModelsRequest(), None)
    assert [(info.name, info.loaded) for info in answer.models] == [("a", True), ("b", False)]
    assert answer.roots == ["numbers"]
    assert backend.scanned_on
    assert threading.current_thread() not in backend.scanned_on


async def test_an_unknown_name_is_its_callers_mistake_and_not_logged(
    backend: Backend, models: LoadedModels[int], caplog: pytest.LogCaptureFixture
) -> None:
    results = await asyncio.gather(*(models.get("c") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [NotFound] * 3
    assert caplog.records == []


async def test_a_load_outlives_the_caller_that_began_it(backend: Backend, models: LoadedModels[int]) -> None:
    first, second = (asyncio.create_task(models.get("a")) for _ in range(2))
    assert await asyncio.to_thread(backend.begun.wait, 10)
    first.cancel()
    backend.go.set()
    assert await second == 1
    assert backend.asked == ["a"]


async def test_a_failed_load_fails_all_who_wait_and_can_be_retried(backend: Backend, models: LoadedModels[int]) -> None:
    backend.go.set()
    backend.fail = True
    results = await asyncio.gather(models.get("a"), models.get("a"), return_exceptions=True)
    assert [str(result) for result in results] == ["the disk is gone"] * 2
    backend.fail = False
    assert await models.get("a") == 2


@pytest.mark.parametrize("name", ["../a", "a/../a", "/etc/passwd", "", ".", "A", "a\0", "%2e%2e/a"])
async def test_a_name_that_is_not_listed_touches_nothing(
    backend: Backend, models: LoadedModels[int], name: str
) -> None:
    with pytest.raises(NotFound, match="available: a, b"):
        await models.get(name)
    assert backend.asked == []


def test_traversal_names_are_never_listed(tmp_path: Path) -> None:
    put(tmp_path, "outside")
    put(tmp_path / "root", "inside")
    folders = Repository([tmp_path / "root"]).folders()
    assert "../outside" not in folders
    assert list(folders) == ["inside"]


def test_an_error_that_lists_many_models_stays_short() -> None:
    error = NotFound("model", "x" * 1000, [f"organisation/model-{i:04}" for i in range(5000)])
    assert len(str(error)) < 2000
    assert "organisation/model-0000, organisation/model-0001" in str(error)
    listed = str(error).count("organisation/")
    assert str(error).endswith(f" and {5000 - listed} more")


TABLE = {
    "absent": BackendEntry("nowhere:Nothing", library="a_library_that_is_not_there"),
    "dotted": BackendEntry("nowhere:Nothing", library="a_library.that_is_not_there"),
    "fake": BackendEntry("fractions:Fraction", explicit=True),
    "here": BackendEntry("decimal:Decimal", library="decimal"),
    "later": BackendEntry("nowhere:Nothing"),
}


def test_auto_picks_the_first_that_is_installed_and_not_explicit() -> None:
    assert choose_backend(TABLE, "auto").__name__ == "Decimal"


def test_an_explicit_backend_is_picked_by_name_only() -> None:
    assert choose_backend(TABLE, "fake").__name__ == "Fraction"
    with pytest.raises(FailedPrecondition, match="a_library_that_is_not_there"):
        choose_backend({name: TABLE[name] for name in ("absent", "fake")}, "auto")


@pytest.mark.parametrize("name", ["absent", "dotted"])
def test_a_missing_library_is_named(name: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"needs the package a_library[._]that_is_not_there"):
        choose_backend(TABLE, name)


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="auto or one of absent, dotted, fake, here, later"):
        choose_backend(TABLE, "nonsense")


class OnDisk(Backend):
    """Of "a" a folder on a disk is read: the load answers what is in its file."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.repository = Repository([root])
        self.go.set()

    def cards(self) -> Mapping[str, ModelCard]:
        return {name: ModelCard(name) for name in self.repository.folders()}

    def load(self, name: str) -> int:
        super().load(name)
        return int((self.repository.folders()[name].path / "weights").read_text())


@pytest.fixture
def on_disk(models: LoadedModels[int], tmp_path: Path) -> OnDisk:
    models.backend = OnDisk(tmp_path)
    put(tmp_path, "a")
    put(tmp_path, "a", "weights", "1")
    return models.backend


async def test_a_model_whose_files_changed_is_read_again_and_others_are_not(on_disk, models, tmp_path) -> None:
    assert await models.refresh("a") is True
    assert await models.refresh("a") is False
    assert (await models.get("a"), on_disk.asked) == (1, ["a"])
    put(tmp_path, "a", "weights", "22")
    assert await models.get("a") == 1  # nobody said that it is whole
    assert await models.refresh("a") is True
    assert (await models.get("a"), on_disk.asked) == (22, ["a", "a"])


async def test_a_model_that_cannot_be_read_again_goes_on_as_it_was(on_disk, models, tmp_path) -> None:
    await models.refresh("a")
    put(tmp_path, "a", "weights", "no number")
    with pytest.raises(ValueError, match="no number"):
        await models.refresh("a")
    assert await models.get("a") == 1
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(NotFound, match="available: none"):
        await models.refresh("a")
    assert await models.get("a") == 1


async def test_whoever_refreshes_meanwhile_shares_the_load(on_disk, models) -> None:
    on_disk.go.clear()
    tasks = [asyncio.create_task(models.refresh("a")) for _ in range(4)]
    assert await asyncio.to_thread(on_disk.begun.wait, 10)
    on_disk.go.set()
    await asyncio.gather(*tasks)
    assert on_disk.asked == ["a"]


async def test_an_unloaded_model_is_loaded_by_who_asks_next(on_disk, models) -> None:
    await models.get("a")
    assert await models.unload("a") is True
    assert not models.is_loaded("a")
    assert await models.unload("a") is False
    assert await models.get("a") == 1
    assert on_disk.asked == ["a", "a"]
    with pytest.raises(NotFound, match="available: a"):
        await models.unload("b")


async def test_a_load_under_way_ends_before_it_is_unloaded(on_disk, models) -> None:
    on_disk.go.clear()
    asked = asyncio.create_task(models.get("a"))
    assert await asyncio.to_thread(on_disk.begun.wait, 10)
    unloaded = asyncio.create_task(models.unload("a"))
    on_disk.go.set()
    assert await asked == 1
    assert await unloaded is True
