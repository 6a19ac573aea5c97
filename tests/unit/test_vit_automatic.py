"""``backend=auto``: engines are opened once, and whoever looks meanwhile sees them all."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagemesh_runtime.registry import BackendEntry, ModelCard, Repository
from imagemesh_services.vit import automatic
from imagemesh_services.vit.config import VitConfig


class Engine:
    """Has no model."""

    name, device, dtype = "engine", "cpu", "float32"
    repository = Repository([])

    def __init__(self, config: VitConfig) -> None:
        self.config = config

    def cards(self) -> Mapping[str, ModelCard]:
        return {}


class Slow(Engine):
    """Takes a while to be opened."""

    opening, go = threading.Event(), threading.Event()

    def cards(self) -> Mapping[str, ModelCard]:
        return {"graph": ModelCard("graph", {"format": "onnx"})}

    def __init__(self, config: VitConfig) -> None:
        super().__init__(config)
        self.opening.set()
        assert self.go.wait(10)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> automatic.EachByItsFormat:
    table = {"first": BackendEntry(f"{__name__}:Engine"), "second": BackendEntry(f"{__name__}:Slow")}
    monkeypatch.setattr(automatic, "BACKENDS", table)
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "config.json").write_text("{}")
    (tmp_path / "graph" / "model.onnx").touch()
    backend = automatic.EachByItsFormat(VitConfig())
    backend.repository = Repository([tmp_path])
    return backend


def test_who_looks_while_an_engine_is_being_opened_sees_its_models_too(backend):
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(backend.cards)
        assert Slow.opening.wait(10)
        other = pool.submit(backend.cards)
        threading.Timer(0.2, Slow.go.set).start()
        assert list(one.result(10)) == list(other.result(10)) == ["graph"]
    assert len(backend._engines) == 2
