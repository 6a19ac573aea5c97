"""From a module to a graph that is kept: never of one and called by the other's weights."""

from pathlib import Path
from typing import Any

import pytest

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_services.graphs.cache import GraphCache
from imagemesh_services.graphs.torch import compiler
from imagemesh_services.graphs.torch.compiler import Compiler, Sources
from imagemesh_services.text_encoder import backend as text_encoder
from imagemesh_services.text_encoder.config import TextEncoderConfig
from tests.support.backends import open_backend


class Engine:
    """Opens whatever it gets, and answers its content."""

    def open(self, path: Path) -> Any:
        return path.read_text()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "unet" / "model.safetensors"
    path.parent.mkdir()
    path.write_text("old")
    return path


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setattr(compiler, "write_onnx", lambda traced, path: path.write_text(traced))
    return Compiler(Engine(), GraphCache(tmp_path / "graphs"))


@pytest.mark.parametrize("lost", [False, True])
def test_weights_that_are_replaced_while_they_are_read_make_no_graph(
    made: Compiler, weights: Path, tmp_path: Path, lost: bool
) -> None:
    before = Sources.of([weights.parent])

    def trace() -> Any:
        weights.unlink() if lost else weights.write_text("new")
        return "new"

    with pytest.raises(FailedPrecondition, match="the unet's files were replaced"):
        made.compile("unet", before, trace)
    assert list((tmp_path / "graphs").iterdir()) == []
    weights.write_text("old")
    assert made.compile("unet", Sources.of([weights.parent]), lambda: "old") == "old"
    weights.write_text("new")
    assert made.compile("unet", Sources.of([weights.parent]), lambda: "new") == "new"


class Asked(Exception):
    """For a graph."""


def test_a_text_encoders_graph_is_of_its_tokenizer_too(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its windows' length is of the graph's making."""
    asked: list[Sources] = []

    def compile(self: Compiler, what: str, sources: Sources, trace: Any) -> Any:
        asked.append(sources)
        raise Asked

    monkeypatch.setattr(Compiler, "compile", compile)
    backend = open_backend(text_encoder.BACKENDS, "onnxruntime", TextEncoderConfig, models)
    name = next(iter(backend.cards()))
    with pytest.raises(Asked):
        backend.load(name)
    folder = backend.repository.folders()[name].path
    assert asked[0].paths[:2] == (folder / "text_encoder", folder / "tokenizer")
