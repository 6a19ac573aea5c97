"""Backends at their seam, without a service around them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.registry import BackendEntry, choose_backend


def open_backend(table: Mapping[str, BackendEntry], name: str, config: type[ModelServerConfig], models: Path) -> Any:
    """The backend ``name`` over the models in that folder."""
    return choose_backend(table, name)(config(backend=name, models=str(models), device="cpu", threads=2))


def load_first(table: Mapping[str, BackendEntry], name: str, config: type[ModelServerConfig], models: Path) -> Any:
    """The first model that the backend lists, loaded."""
    backend = open_backend(table, name, config, models)
    return backend.load(next(iter(backend.cards())))
