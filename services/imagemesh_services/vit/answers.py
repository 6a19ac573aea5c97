"""Arrays on their way out."""

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

from imagemesh.v1 import tensor_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh_runtime.errors import NotFinite
from imagemesh_runtime.tensors import Array, to_proto
from imagemesh_services.vit.backend import Embedding

DEFAULT_TOP_K: Final = 5


def classification(logits: Array, labels: Sequence[str], request: pb.ClassifyImagesRequest) -> pb.Classification:
    """The likeliest labels of one picture, float32 [labels] of logits."""
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(-logits, kind="stable")[: request.top_k or DEFAULT_TOP_K]
    predictions = [
        pb.Prediction(label=labels[i], probability=probabilities[i], index=i, logit=logits[i])
        for i in best.tolist()
        if probabilities[i] >= request.threshold
    ]
    return pb.Classification(predictions=predictions)


def embedding_fields(request: pb.EmbedImagesRequest, embedding: Embedding, side: int) -> dict[str, Any]:
    """The fields of the response that hold what the model gave, in the dtype asked for.

    Args:
        side: pixels of the attention's pictures.

    Raises:
        NotFinite: numbers too large for float16.
    """
    vectors = normalized(embedding.vectors) if request.normalize else embedding.vectors
    states = None if embedding.hidden_states is None else embedding.hidden_states.swapaxes(0, 1)
    fields: dict[str, Any] = {}
    if request.dtype == tensor_pb2.DTYPE_INT8:
        vectors, scales = quantized(vectors)
        fields["scales"] = to_proto(scales)
    elif request.dtype == tensor_pb2.DTYPE_FP16:
        vectors = _halved(request.model, vectors)
        states = None if states is None else _halved(request.model, states)
    if embedding.attention is not None:
        fields["attention_maps"] = [_picture(one, side) for one in embedding.attention]
    return fields | {"embeddings": to_proto(vectors), "hidden_states": None if states is None else to_proto(states)}


def normalized(vectors: Array) -> Array:
    """Each row divided by its Euclidean length; a row of zeros stays one."""
    lengths: Array = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Array = vectors / np.where(lengths > 0, lengths, 1)
    return unit.astype(vectors.dtype)


def quantized(vectors: Array) -> tuple[Array, Array]:
    """int8 [n, width] and float32 [n]: row i is about its 8-bit numbers times scale i, off by half a scale at most."""
    scales = np.abs(vectors).max(axis=1) / np.float32(127)
    steps = vectors / np.where(scales > 0, scales, 1)[:, None]
    return np.clip(np.rint(steps), -127, 127).astype(np.int8), scales.astype(np.float32)


def _halved(model: str, array: Array) -> Array:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise NotFinite(model, "embeddings in float16")
    return half


def _picture(attention: Array, side: int) -> bytes:
    """A grey PNG, the largest value white; nothing is looked at in black."""
    most = float(attention.max())
    grey = np.rint(attention * (255 / most if most > 0 else 0)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).resize((side, side), Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()
