"""From arguments to requests, for what understands pictures."""

import operator
from collections.abc import Iterable, Mapping
from typing import Final, Literal, SupportsIndex, TypedDict, Unpack

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, tensor_pb2, vit_service_pb2
from imagemesh_client.fields import UINT32, number, text, whole, whole_or_absent
from imagemesh_client.images import ImageInput, as_list, image_to_proto
from imagemesh_client.types import PoolingName
from imagemesh_runtime.errors import InvalidArgument

# Of one call; the mesh's own bound.
MAX_IMAGES: Final = 64

POOLINGS: Final[Mapping[PoolingName, vit_service_pb2.Pooling.ValueType]] = {
    "auto": vit_service_pb2.POOLING_UNSPECIFIED,
    "cls": vit_service_pb2.POOLING_CLS,
    "mean": vit_service_pb2.POOLING_MEAN,
}
VectorDtype = Literal["float32", "float16", "int8"]
_DTYPES = {
    "float32": tensor_pb2.DTYPE_FP32,
    "float16": tensor_pb2.DTYPE_FP16,
    "int8": tensor_pb2.DTYPE_INT8,
}


class EmbedOptions(TypedDict, total=False):
    """How to embed; what is left out is as the model was trained."""

    # Empty: the mesh's default.
    model: str
    dtype: VectorDtype
    # Pixels of the side that pictures are brought to; None: as the model was trained.
    size: int | None
    # Hidden states to answer as well: 0 is the embedding layer's output, -1 the last layer's; "all": every one.
    layers: Iterable[int] | Literal["all"]
    # Answer what the class token looks at, as pictures.
    attention_maps: bool


def classify_request(
    images: ImageInput | Iterable[ImageInput], top_k: int, threshold: float, size: int | None, model: str
) -> pb.ClassifyRequest:
    """The request for ``classify``; reads files."""
    return pb.ClassifyRequest(
        images=pictures(images),
        top_k=whole("top_k", top_k, UINT32, least=1),
        threshold=number("threshold", threshold),
        size=whole_or_absent("size", size),
        model=text("model", model),
    )


def embed_request(
    images: ImageInput | Iterable[ImageInput], pooling: PoolingName, normalize: bool, **options: Unpack[EmbedOptions]
) -> pb.EmbedRequest:
    """The request for ``embed``; reads files."""
    dtype, layers = options.get("dtype", "float32"), options.get("layers", ())
    if pooling not in POOLINGS:
        raise InvalidArgument("pooling", pooling, ", ".join(POOLINGS))
    if dtype not in _DTYPES:
        raise InvalidArgument("dtype", dtype, ", ".join(_DTYPES))
    return pb.EmbedRequest(
        images=pictures(images),
        pooling=POOLINGS[pooling],
        normalize=bool(normalize),
        model=text("model", options.get("model", "")),
        dtype=_DTYPES[dtype],
        size=whole_or_absent("size", options.get("size")),
        hidden_states=layers == "all",
        layers=[] if layers == "all" else [_layer(i, layer) for i, layer in enumerate(layers)],
        attention_maps=bool(options.get("attention_maps", False)),
    )


def pictures(images: ImageInput | Iterable[ImageInput]) -> list[image_pb2.Image]:
    """The pictures of one call; reads files."""
    found = as_list(images)
    if len(found) > MAX_IMAGES:
        allowed = f"1 to {MAX_IMAGES} pictures; classify_stream and embed_stream take any number"
        raise InvalidArgument("images", f"{len(found)} pictures", allowed)
    return [image_to_proto(image, f"images[{i}]") for i, image in enumerate(found)]


def _layer(i: int, layer: SupportsIndex | str) -> int:
    """Python's own way to count from the end; the service knows how many there are."""
    try:
        number = operator.index(layer)  # type: ignore[arg-type]
    except TypeError:
        number = 2**31
    if not -(2**31) <= number < 2**31:
        raise InvalidArgument(f"layers[{i}]", layer, "the number of a layer")
    return number
