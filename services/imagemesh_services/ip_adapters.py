"""IP-Adapters on disk, in the layout that diffusers' ``load_ip_adapter`` reads (as h94/IP-Adapter has it).

A folder, down to three below a root, that has an ``image_encoder``; each safetensors file beside that is an adapter,
and its name is its path below the root without the suffix, such as ``IP-Adapter/models/ip-adapter_sd15``. One that was
made for another encoder takes that of a folder next to its own. Imported by backends alone.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from imagemesh_runtime.registry import Repository

log = logging.getLogger(__name__)

_DEPTHS: Final = ("*", "*/*", "*/*/*")
_ENCODER: Final = "image_encoder"


@dataclass(frozen=True)
class IpAdapter:
    """An adapter.

    Attributes:
        width: of what it is told of a picture.
        hidden: whether it wants the hidden states before the encoder's last layer, and not the projected embedding.
        encoder: the folder of a CLIPVisionModelWithProjection that gives that.
    """

    name: str
    path: Path
    width: int
    hidden: bool
    encoder: Path


def find_adapters(repository: Repository) -> dict[str, IpAdapter]:
    """All adapters by name, read anew from disk; what can't be read, or is of no kind known here, is left out."""
    found: dict[str, IpAdapter] = {}
    for root in repository.roots:
        for path in _files(root):
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in found or any(part.startswith(".") for part in name.split("/")):
                continue
            try:
                adapter = _read(name, path, root)
            except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
                log.warning("IP-Adapter %s is left out: %s: %s", name, type(error).__name__, error)
                continue
            if adapter is not None:
                found[name] = adapter
    return found


def _files(root: Path) -> Iterator[Path]:
    for depth in _DEPTHS:
        for config in sorted(root.glob(f"{depth}/{_ENCODER}/config.json")):
            folder = config.parent.parent
            if not (folder / "model_index.json").exists():
                yield from sorted(folder.glob("*.safetensors"))


def _read(name: str, path: Path, root: Path) -> IpAdapter | None:
    with safe_open(path, framework="numpy") as file:
        names = [key for key in list(file.keys()) if key.startswith("image_proj.")]
        shapes = {key: file.get_slice(key).get_shape() for key in names}
    kind = _kind({key.removeprefix("image_proj."): shape for key, shape in shapes.items()})
    if kind is None:
        log.warning("IP-Adapter %s is left out: it is told of faces by another model, or of a kind unknown here", name)
        return None
    width, hidden = kind
    folders = [path.parent, *(sorted(path.parent.parent.glob("*")) if path.parent.parent != root else ())]
    for encoder in (folder / _ENCODER for folder in folders if (folder / _ENCODER / "config.json").exists()):
        config = json.loads((encoder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{encoder / 'config.json'} holds no object")
        if config.get("hidden_size" if hidden else "projection_dim") == width:
            return IpAdapter(name, path, width, hidden, encoder)
    log.warning("IP-Adapter %s is left out: no image_encoder gives embeddings of width %d", name, width)
    return None


def _kind(shapes: Mapping[str, Any]) -> tuple[int, bool] | None:
    """Width, and whether of hidden states, by the parts that diffusers tells the kinds apart by."""
    if "perceiver_resampler.proj_in.weight" in shapes:
        return None  # Face ID plus
    if "proj.weight" in shapes:
        return shapes["proj.weight"][1], False
    if "proj.3.weight" in shapes:
        return shapes["proj.0.weight"][1], True  # full face
    if "latents" in shapes:
        return shapes["proj_in.weight"][1], True  # plus
    return None
