"""What a request to embed asks for, checked against what the model can give."""

import math
from typing import Final

import numpy as np

from imagemesh.v1 import tensor_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_services.vit.backend import Pooling, VitModel, Wanted

_POOLINGS: Final = {pb.POOLING_CLS: Pooling.CLS, pb.POOLING_MEAN: Pooling.MEAN}
NUMBERS: Final = {pooling: number for number, pooling in _POOLINGS.items()}
DTYPES: Final = (tensor_pb2.DTYPE_UNSPECIFIED, tensor_pb2.DTYPE_FP32, tensor_pb2.DTYPE_FP16, tensor_pb2.DTYPE_INT8)


def wanted_of(request: pb.EmbedImagesRequest, model: VitModel, max_bytes: int) -> Wanted:
    """The request as the seam has it.

    Args:
        max_bytes: what fits into the answer.

    Raises:
        InvalidArgument: a field has a value that isn't allowed, or that this model can't do, or the hidden states
            would not fit into the answer.
        FailedPrecondition: the model can only classify.
    """
    if request.dtype not in DTYPES:
        shown = ", ".join(tensor_pb2.Dtype.Name(dtype) for dtype in DTYPES[1:])
        raise InvalidArgument("dtype", request.dtype, f"one of {shown}")
    pooling = _pooling(request, model)
    if request.attention_maps and not model.rollout:
        raise InvalidArgument("attention_maps", True, "false: this model has no attention from token to token")
    wanted = Wanted(pooling, _layers(request, model), request.attention_maps)
    if wanted.layers:
        _check_room(request, model, wanted, max_bytes)
    return wanted


def _pooling(request: pb.EmbedImagesRequest, model: VitModel) -> Pooling:
    if request.pooling != pb.POOLING_UNSPECIFIED and request.pooling not in _POOLINGS:
        raise InvalidArgument("pooling", request.pooling, f"one of {', '.join(pb.Pooling.keys())}")
    if not model.poolings:
        raise FailedPrecondition(f"model {request.model} only classifies: how to read its hidden states isn't known")
    pooling = _POOLINGS.get(request.pooling, model.poolings[0])
    if pooling not in model.poolings:
        raise InvalidArgument("pooling", "POOLING_CLS", "POOLING_MEAN: this model has no class token")
    return pooling


def _layers(request: pb.EmbedImagesRequest, model: VitModel) -> tuple[int, ...]:
    count = len(model.states)
    if request.hidden_states:
        if request.layers:
            raise InvalidArgument("layers", list(request.layers), "empty where hidden_states asks for all")
        layers = list(range(count))
    else:
        layers = list(request.layers)
    for i, layer in enumerate(layers):
        if not -count <= layer < count:
            raise InvalidArgument(f"layers[{i}]", layer, f"{-count} to {count - 1} for this model")
    chosen = tuple(layer % count for layer in layers)
    if len({model.states[layer] for layer in chosen}) > 1:
        shapes = ", ".join(f"{layer}: {list(model.states[layer])}" for layer in sorted(set(chosen)))
        raise InvalidArgument("layers", layers, f"of one shape; this model's tokens and widths are {shapes}")
    return chosen


def _check_room(request: pb.EmbedImagesRequest, model: VitModel, wanted: Wanted, max_bytes: int) -> None:
    """Refuse before the work what would not fit into the answer."""
    tokens, width = model.states[wanted.layers[0]]
    if request.size:
        tokens = math.ceil(tokens * (model.sizes.check(request.size) / model.sizes.trained) ** 2)
    an_image = len(wanted.layers) * tokens * width * np.dtype(np.float32).itemsize
    most = max_bytes // an_image
    images = len(request.images)
    if images > most:
        raise InvalidArgument("images", images, f"at most {most} where so many hidden states are asked for")
