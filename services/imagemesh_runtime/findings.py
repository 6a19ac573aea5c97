"""What to tell an operator whose service has no model: where it looked, what lies there, what a model looks like."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from imagemesh_runtime.registry import MARKERS, Repository

A_MODEL: Final = (
    "a model is a folder below one of the roots, as save_pretrained writes it: a diffusers pipeline with its "
    "model_index.json, or a ViT or ControlNet with its config.json"
)
_SHOWN: Final = 8  # of what lies in a root
_FILES: Final = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")


def nothing_to_serve(service: str, repository: Repository) -> str:
    """Why the service found none; reads the disk."""
    found = [f"{folder.name} ({_kind(folder.config)})" for folder in repository.folders().values()]
    parts = [f"{service} has no model to serve: it looked in {listed(map(str, repository.roots))}"]
    if found:
        parts.append(f"which holds {listed(found)}, and runs none of these")
    else:
        parts.append("which holds no model folder")
    hints = [hint for root in repository.roots for hint in _hints(root)]
    return "; ".join([", ".join(parts), *hints, A_MODEL])


def listed(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _kind(config: Mapping[str, Any]) -> str:
    """The class that a folder says it is of."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return str(config.get("_class_name") or first or config.get("model_type") or "of no class")[:80]


def _hints(root: Path) -> Iterator[str]:
    """What is likely to be the mistake."""
    if any((root / marker).is_file() for marker in MARKERS):
        yield f"{root} is a model itself: give the folder that holds it, {root.resolve().parent}"
    files = sorted(path.name for path in root.iterdir() if path.suffix.lower() in _FILES and path.is_file())
    if files:
        yield f"{listed(files)} in {root} {'are files' if len(files) > 1 else 'is a file'} and no folder"
