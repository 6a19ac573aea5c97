"""A classifier that was compiled to a graph: what is common to all that run one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import ModelCard, ModelFolder
from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.backend import Embedding, Pooling, Sizes, Wanted
from imagemesh_services.vit.families import FAMILIES, Family
from imagemesh_services.vit.processing import processed
from imagemesh_services.vit.weights import find_weights

# What graphs give. Those of others have the logits, and then only classify.
LOGITS: Final = "logits"  # [n, labels]
LAST: Final = "last_hidden_state"  # [n, tokens, width], past the final norm
POOLED: Final = "pooler_output"  # [n, width], of families that norm after the mean
STATE: Final = "hidden_states."  # with a number: [n, tokens, width] or [n, width, rows, columns]


# A graph that an engine has loaded: float32 [n, 3, h, w] to its outputs by name, float32.
Graph = Callable[[Array], Mapping[str, Array]]


def in_batches(run: Graph, pixels: Array, rows: int) -> Mapping[str, Array]:
    """``run``'s outputs for the pictures, where it takes ``rows`` of them at a time and no other number; 0: any."""
    if not rows:
        return run(pixels)
    missing = -len(pixels) % rows
    padded = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), pixels.dtype)])
    parts = [run(part) for part in np.split(padded, len(padded) // rows)]
    return {name: np.concatenate([part[name] for part in parts])[: len(pixels)] for name in parts[0]}


class GraphVitModel:
    """A graph with its folder's image processor and labels; takes pictures of the trained size.

    Raises:
        FailedPrecondition: the labels or the processor belong to another model.
    """

    rollout = False

    def __init__(self, folder: ModelFolder, processor: Any, graph: Graph) -> None:
        family = FAMILIES.get(str(folder.config.get("model_type")))
        self._processor, self._graph, self._family = processor, graph, family or Family()
        self.prefix = self._family.prefix(_Config(folder.config))
        pixels = self.preprocess(np.zeros((48, 64, 3), np.uint8))
        found = self._first_run(folder.name, pixels)
        self.labels = _labels(folder, found[LOGITS].shape[1])
        self.sizes = Sizes(pixels.shape[1], 1, 0)
        whole = family is not None and (POOLED if self._family.pooled else LAST) in found
        self.poolings = ((Pooling.CLS,) if self.prefix else ()) + (Pooling.MEAN,) if whole else ()
        states = [_tokens(found[name]).shape for name in self._states(found)] if whole else []
        self.states = [(tokens, width) for _, tokens, width in states]
        self.width = self._vectors(found, self.poolings[0]).shape[1] if whole else 0

    def preprocess(self, image: Array, size: int = 0) -> Array:
        return processed(self._processor, image)

    def classify(self, pixels: Array) -> Array:
        return self._graph(pixels)[LOGITS]

    def embed(self, pixels: Array, wanted: Wanted) -> Embedding:
        found = self._graph(pixels)
        chosen = [_tokens(found[f"{STATE}{layer}"]) for layer in wanted.layers]
        return Embedding(self._vectors(found, wanted.pooling), np.stack(chosen, axis=1) if chosen else None)

    def _vectors(self, found: Mapping[str, Array], pooling: Pooling) -> Array:
        if pooling is Pooling.CLS:
            return found[LAST][:, 0]
        if self._family.pooled:
            return found[POOLED].reshape(len(found[POOLED]), -1)
        mean: Array = found[LAST][:, self.prefix :].mean(axis=1)
        return mean

    def _states(self, found: Mapping[str, Array]) -> list[str]:
        return [f"{STATE}{i}" for i in range(sum(name.startswith(STATE) for name in found))]

    def _first_run(self, name: str, pixels: Array) -> Mapping[str, Array]:
        """Find out now, not at the first picture, that graph and processor don't fit."""
        try:
            found = self._graph(pixels[None])
        except Exception as error:  # each engine has its own
            given = f"its preprocessor_config.json gives pictures of {list(pixels.shape)}"
            raise FailedPrecondition(f"model {name}: {given}, which its graph can't take: {error}") from error
        if LOGITS not in found or found[LOGITS].ndim != 2:
            raise FailedPrecondition(f"model {name}: its graph has no output {LOGITS} of [pictures, labels]")
        return found


class _Config:
    """config.json as families read it."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.__dict__.update(content)


def known_name(names: Iterable[str]) -> str:
    """Of an output's names, as some engines have several, the one that means something here."""
    ordered = sorted(names)
    known = [name for name in ordered if name in (LOGITS, LAST, POOLED) or name.startswith(STATE)]
    return (known or ordered)[0]


def graph_card(folder: ModelFolder, formats: Sequence[str]) -> ModelCard | None:
    """What is known of the folder without loading it; None: it has no graph of these formats, or is no classifier."""
    names = folder.config.get("architectures") or [""]
    weights = find_weights(folder.path, formats)
    if weights is None or not str(names[0]).endswith("ForImageClassification"):
        return None
    labels = str(len(folder.config.get("id2label", ())))
    return ModelCard(folder.name, {"class": str(names[0]), "labels": labels, "format": weights.format})


def _labels(folder: ModelFolder, rows: int) -> list[str]:
    given = folder.config.get("id2label") or {}
    found = {int(key): str(label) for key, label in given.items() if str(key).isdecimal()}
    if sorted(found) != list(range(rows)):
        asked = f"id2label of its config.json must number its {rows} labels from 0 on"
        raise FailedPrecondition(f"model {folder.name}: {asked}, it has {len(given)}")
    return [found[i] for i in range(rows)]


def _tokens(state: Array) -> Array:
    """A hidden state as [n, tokens, width], also where it is [n, width, rows, columns]."""
    return state.reshape(*state.shape[:2], -1).swapaxes(1, 2) if state.ndim == 4 else state
