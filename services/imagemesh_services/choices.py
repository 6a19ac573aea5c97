"""Which engine runs which model fastest here, as ``imagemesh tune --engines`` measured it: a file of the user's."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.registry import BackendEntry

log = logging.getLogger(__name__)

_VERSION: Final = 1
_KEPT: Final = 1000
_MODE: Final = 0o644
# What else a library's package may be called.
_PACKAGES: Final = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")}


@dataclass(frozen=True)
class Choice:
    """The engine that was fastest, and the seconds that each took for the same work (medians).

    Attributes:
        model: a fingerprint of its folder.
        device: as configured, as the element type is; each engine has its own reading of "auto".
        versions: of the engines' libraries.
    """

    service: str
    model: str
    device: str
    dtype: str
    threads: int
    versions: str
    engine: str
    seconds: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, str, str, int, str]:
        """What it holds for; it is trusted for nothing else."""
        return (self.service, self.model, self.device, self.dtype, self.threads, self.versions)


def choices_path(config: ModelServerConfig, env: Mapping[str, str] = os.environ) -> Path:
    """The configured file, or one in the user's state."""
    if config.engines_file:
        return Path(config.engines_file).expanduser()
    state = env.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(state, "imagemesh", "engines.json")


def versions_of(table: Mapping[str, BackendEntry]) -> str:
    """Of the libraries of a service's backends, as far as they are here; nothing is imported to find out."""
    libraries = sorted({entry.library for entry in table.values() if entry.library and entry.installed})
    return ", ".join(f"{name} {_version(name)}" for name in libraries)


def read_choices(path: Path) -> list[Choice]:
    """What the file holds; an entry that can't be right, or a file that is none, is left out with a warning."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            raise ValueError(f"not of version {_VERSION}")
        entries = content["choices"]
        if not isinstance(entries, list):
            raise ValueError("choices is no list")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, RecursionError) as error:
        log.warning("no engines are taken from %s: %s", path, error)
        return []
    found = [_read(entry) for entry in entries[-_KEPT:]]
    if None in found:
        log.warning("%s has entries that can't be read", path)
    return [one for one in found if one is not None]


def write_choices(path: Path, new: Iterable[Choice]) -> None:
    """Add these to the file, each in the place of what it had of the same kind; the file is whole at any moment."""
    kept = {one.key: one for one in read_choices(path)}
    for one in new:
        kept.pop(one.key, None)
        kept[one.key] = one
    entries = [dataclasses.asdict(one) for one in kept.values()][-_KEPT:]
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, prefix=".engines-", delete=False) as file:
        json.dump({"version": _VERSION, "choices": entries}, file, indent=1)
    os.chmod(file.name, _MODE)  # services may run as other users than who measured
    os.replace(file.name, path)


def _read(entry: Any) -> Choice | None:
    try:
        choice = Choice(**entry)
        texts: Sequence[Any] = (
            choice.service, choice.model, choice.device, choice.dtype, choice.versions, choice.engine,
        )  # fmt: skip
        numbers = all(isinstance(one, int | float) for one in choice.seconds.values())
        right = all(isinstance(one, str) for one in texts) and isinstance(choice.threads, int) and numbers
    except (TypeError, AttributeError):
        return None
    return choice if right else None


def _version(library: str) -> str:
    for package in _PACKAGES.get(library, (library,)):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "?"
