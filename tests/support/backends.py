"""Backends at their seam, without a service around them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.registry import BackendEntry, choose_backend


def open_backend(
    table: Mapping[str, BackendEntry], name: str, config: type[ModelServerConfig], models: Path, **settings: Any
) -> Any:
    """The backend ``name`` over the models in that folder."""
    return choose_backend(table, name)(config(backend=name, models=str(models), device="cpu", threads=2, **settings))


def each_with(table: Mapping[str, BackendEntry], cases: Sequence[Any], few: Sequence[Any]) -> list[tuple[str, Any]]:
    """(backend, case): with ``few`` cases those that are torch's but for the forward, the others with all."""
    return [(name, case) for name in table for case in (cases if name in ("torch", "fake") else few)]


def load_first(table: Mapping[str, BackendEntry], name: str, config: type[ModelServerConfig], models: Path) -> Any:
    """The first model that the backend lists, loaded."""
    backend = open_backend(table, name, config, models)
    return backend.load(next(iter(backend.cards())))
