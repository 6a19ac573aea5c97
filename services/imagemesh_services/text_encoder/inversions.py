"""Textual inversions (Gal et al., "An Image is Worth One Word", 2022): words of a model folder's own.

They lie in a folder ``embeddings`` inside the model's folder, or beside the models for all whom they fit. A file's name
is the word; ``learned_embeds.safetensors``, which the library calls all of its own, has the word inside. Files are
safetensors of one tensor, [width] or [vectors, width], as diffusers and AUTOMATIC1111 write them, or of ``clip_l`` and
``clip_g`` for the two encoders of Stable Diffusion XL. Pickles are never read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from imagemesh_runtime.registry import ModelFolder

FOLDER: Final = "embeddings"
MAX_VECTORS: Final = 75  # what a window holds
_LIBRARYS_NAME: Final = "learned_embeds"
_PAIR: Final = ("clip_l", "clip_g")


@dataclass(frozen=True)
class Inversion:
    """A word's file, and of each encoder which tensor in it holds the word's vectors."""

    path: Path
    keys: Sequence[str]
    vectors: int

    def tokens(self, word: str) -> list[str]:
        """What the word is tokenized to, by the library's names."""
        return [word, *(f"{word}_{i}" for i in range(1, self.vectors))]


@dataclass(frozen=True)
class Inversions:
    """The words that a model has, and those that it can't have with what is the matter."""

    usable: Mapping[str, Inversion] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)


def places(folder: ModelFolder) -> list[Path]:
    """The folders that may hold a model's words, its own first."""
    root = folder.path.parents[folder.name.count("/")]
    return [path for path in (folder.path / FOLDER, root / FOLDER) if path.is_dir()]


def find_inversions(folder: ModelFolder, widths: Sequence[int]) -> Inversions:
    """The words for encoders of these widths; of two files for a word the model's own wins."""
    usable: dict[str, Inversion] = {}
    unusable: dict[str, str] = {}
    for path in _files(folder):
        word = path.stem
        try:
            shapes = _shapes(path)
            if word == _LIBRARYS_NAME and len(shapes) == 1:
                word = next(iter(shapes))
            found = _fitted(path, shapes, widths)
        except ValueError as error:
            if word not in usable:
                unusable.setdefault(word, str(error))
            continue
        if word not in usable and word not in unusable:
            usable[word] = found
    return Inversions(usable, unusable)


def _files(folder: ModelFolder) -> Iterator[Path]:
    for place in places(folder):
        yield from sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))


def _shapes(path: Path) -> dict[str, list[int]]:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is no safetensors file (a pickle could run code: convert it)")
    try:
        with safe_open(path, framework="numpy") as file:
            opened: Any = file
            return {key: list(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} can't be read ({error})") from error


def _fitted(path: Path, shapes: Mapping[str, Sequence[int]], widths: Sequence[int]) -> Inversion:
    """The file's tensors, one an encoder.

    Raises:
        ValueError: they are not of a known format, or don't fit; the message says why.
    """
    keys = _keys(path, shapes, widths)
    vectors = set()
    for key, width in zip(keys, widths, strict=True):
        shape = shapes[key]
        if len(shape) not in (1, 2) or not 1 <= (shape[0] if len(shape) == 2 else 1) <= MAX_VECTORS:
            raise ValueError(f"{path.name}: {key} is {list(shape)}, not [width] or [1 to {MAX_VECTORS}, width]")
        if shape[-1] != width:
            raise ValueError(f"{path.name} is made for another model: {key} is {shape[-1]} wide, the encoder {width}")
        vectors.add(shape[0] if len(shape) == 2 else 1)
    if len(vectors) > 1:
        raise ValueError(f"{path.name} has not as many vectors for each encoder")
    return Inversion(path, keys, vectors.pop())


def _keys(path: Path, shapes: Mapping[str, Sequence[int]], widths: Sequence[int]) -> Sequence[str]:
    if set(shapes) == set(_PAIR):
        fitting = [key for key in _PAIR if shapes[key][-1:] == [widths[0]]]
        return _PAIR if len(widths) == len(_PAIR) else (fitting or list(_PAIR))[:1]
    if len(shapes) != 1:
        known = f"one tensor, or {' and '.join(_PAIR)}"
        raise ValueError(f"{path.name} is of no known format: it holds {', '.join(sorted(shapes)[:5])}, not {known}")
    if len(widths) > 1:
        raise ValueError(f"{path.name} is made for one encoder, and the model has {len(widths)}")
    return list(shapes)
