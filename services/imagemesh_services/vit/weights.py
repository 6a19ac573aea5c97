"""Which files of a model's folder hold its weights, and in which of the formats that folders come in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imagemesh_runtime.errors import FailedPrecondition

# The names that transformers, Optimum and OpenVINO give their files; an index names the shards of a large one.
FORMATS: Final[Mapping[str, Sequence[str]]] = {
    "safetensors": ("model.safetensors", "model.safetensors.index.json"),
    "flax": ("flax_model.msgpack", "flax_model.msgpack.index.json"),
    "tensorflow": ("tf_model.h5", "tf_model.h5.index.json"),
    "pytorch": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    "onnx": ("model.onnx", "onnx/model.onnx", "model_quantized.onnx", "onnx/model_quantized.onnx"),
    "openvino": ("openvino_model.xml", "openvino/openvino_model.xml"),
}
# A pickle can run any code; torch's weights-only loader refuses that, but is asked only where the operator said so.
PICKLE: Final = "pytorch"


@dataclass(frozen=True)
class Weights:
    """Where the weights lie: one file, or the shards of one."""

    format: str
    files: tuple[Path, ...]


def find_weights(folder: Path, formats: Sequence[str]) -> Weights | None:
    """The weights in the first of ``formats`` that the folder has.

    Raises:
        FailedPrecondition: an index names what is no file of the folder.
    """
    for format in formats:
        for name in FORMATS[format]:
            path = folder / name
            if path.is_file():
                return Weights(format, _shards(path) if name.endswith(".index.json") else (path,))
    return None


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = tuple(index.parent / name for name in names)
        if not files or any(path.parent != index.parent or not path.is_file() for path in files):
            raise ValueError("it names what is not in the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPrecondition(f"{index.parent.name}/{index.name} can't be read: {error}") from error
    return files
