"""How a smaller or faster form of a model compares with the original: size, speed, and whether they agree."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from imagemesh_runtime.tensors import Array
from imagemesh_services.vit.backend import VitModel
from imagemesh_services.vit.weights import Weights

ROUNDS: Final = 7
BATCH: Final = 16  # pictures of a forward that is timed


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        agreement: share of the pictures for which both find the same label likeliest, 0 to 1.
        difference: the largest of any logit, as a share of the original's largest.
        speed: how many times as fast a forward is; the median of ``ROUNDS`` pairs.
        speed_range: the least and the most of them.
    """

    pictures: int
    agreement: float
    difference: float
    speed: float
    speed_range: tuple[float, float]
    bytes_before: int
    bytes_after: int


def compare(
    original: VitModel, other: VitModel, pictures: Sequence[Array], sizes: tuple[int, int], rounds: int = ROUNDS
) -> Comparison:
    """Show both the same pictures, uint8 [height, width, 3]; ``sizes`` in bytes are passed on.

    Forwards of the two alternate, so that what else the machine does slows both.
    """
    pixels = np.stack([original.preprocess(picture) for picture in pictures])
    ours, theirs = (_logits(model, pixels) for model in (original, other))
    batch = np.resize(pixels, (BATCH, *pixels.shape[1:]))
    ratios = [_seconds(original, batch) / _seconds(other, batch) for _ in range(rounds)]
    return Comparison(
        pictures=len(pixels),
        agreement=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        difference=float(np.abs(ours - theirs).max() / np.abs(ours).max()),
        speed=float(np.median(ratios)),
        speed_range=(min(ratios), max(ratios)),
        bytes_before=sizes[0],
        bytes_after=sizes[1],
    )


def weight_bytes(weights: Weights) -> int:
    """Of the files that hold the weights, with those that lie beside a graph."""
    files = {*weights.files}
    if weights.format in ("onnx", "openvino"):
        graph = weights.files[0]
        beside = (
            graph.with_suffix(".bin"),
            graph.with_name(f"{graph.name}.data"),
            graph.with_name(f"{graph.name}_data"),
        )
        files |= {path for path in beside if path.is_file()}
    return sum(path.stat().st_size for path in files)


def _logits(model: VitModel, pixels: Array) -> Array:
    return np.concatenate([model.classify(part) for part in np.split(pixels, range(BATCH, len(pixels), BATCH))])


def _seconds(model: VitModel, batch: Array) -> float:
    start = time.perf_counter()
    model.classify(batch)
    return time.perf_counter() - start
