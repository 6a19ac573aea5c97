"""Pictures that a generation is to be like, as an IP-Adapter tells the model of them."""

from dataclasses import dataclass
from typing import Final

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import MAX_CONTROL_SCALE, MAX_REFERENCES, MAX_TOKENS, check_range
from imagemesh_runtime.tensors import FLOATS, Array, from_proto, require_finite

# diffusers' names of what ``ReferenceService`` answers.
POSITIVE: Final = "image_embeds"
NEGATIVE: Final = "negative_image_embeds"


@dataclass(frozen=True)
class Reference:
    """A picture, embedded: float [1, width] or [1, tokens, width]; ``negative`` is there where there is guidance."""

    adapter: str
    scale: float
    positive: Array
    negative: Array | None = None


def read_references(request: pb.SampleRequest, guided: bool) -> tuple[Reference, ...]:
    """The request's, checked.

    Raises:
        InvalidArgument: a bound is passed, or a tensor is missing or of another shape.
    """
    check_range("references", len(request.references), 0, MAX_REFERENCES)
    return tuple(_read(one, f"references[{i}]", guided) for i, one in enumerate(request.references))


def _read(given: pb.Reference, field: str, guided: bool) -> Reference:
    check_range(f"{field}.scale", given.scale, 0, MAX_CONTROL_SCALE)
    names = {POSITIVE, NEGATIVE} if guided else {POSITIVE}
    if not names <= set(given.embeds) <= {POSITIVE, NEGATIVE}:
        raise InvalidArgument(f"{field}.embeds", sorted(given.embeds), f"a map of {' and '.join(sorted(names))}")
    found = {name: _embeds(given, name, field) for name in sorted(names)}
    if len({one.shape for one in found.values()}) > 1:
        shapes = {name: list(one.shape) for name, one in found.items()}
        raise InvalidArgument(f"{field}.embeds", shapes, "tensors of equal shape")
    return Reference(given.adapter, given.scale, found[POSITIVE], found.get(NEGATIVE))


def _embeds(given: pb.Reference, name: str, field: str) -> Array:
    path = f"{field}.embeds[{name!r}]"
    found = from_proto(given.embeds[name], path, dtypes=FLOATS)
    if found.ndim not in (2, 3) or len(found) != 1:
        raise InvalidArgument(f"{path}.shape", list(found.shape), "[1, width] or [1, tokens, width]")
    for axis in range(1, found.ndim):
        check_range(f"{path}.shape[{axis}]", found.shape[axis], 1, MAX_TOKENS)
    return require_finite(found, path)
