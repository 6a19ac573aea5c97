"""What T2I-Adapters say of pictures (Mou et al., "T2I-Adapter", 2023): once a generation, the same for every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import MAX_CONTROL_SCALE, MAX_CONTROLS, MAX_SIDE, check_interval, check_range
from imagemesh_runtime.tensors import FLOATS, Array, from_proto, require_finite

_MAX_TENSORS: Final = 16  # of one picture


def steers(start: float, end: float, evaluation: int, evaluations: int) -> bool:
    """Whether that evaluation of so many is in the part from ``start`` to ``end``, as diffusers' pipelines count."""
    return not (evaluation / evaluations < start or (evaluation + 1) / evaluations > end)


@dataclass(frozen=True)
class PictureFeatures:
    """A picture's, float [1, channels, h, w] each, and how much they count in which part of the evaluations."""

    tensors: Sequence[Array]
    scale: float
    start: float = 0.0
    end: float = 1.0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(one.shape for one in self.tensors)


def read_features(request: pb.SampleRequest) -> tuple[PictureFeatures, ...]:
    """The request's, checked.

    Raises:
        InvalidArgument: a bound is passed, or they can't be added up.
    """
    check_range("features", len(request.features), 0, MAX_CONTROLS)
    found = tuple(_read(one, f"features[{i}]") for i, one in enumerate(request.features))
    for i, one in enumerate(found):
        if one.shapes != found[0].shapes:
            raise InvalidArgument(f"features[{i}].tensors", one.shapes, f"of {found[0].shapes}, as the first's")
    return found


def _read(given: pb.PictureFeatures, field: str) -> PictureFeatures:
    check_range(f"{field}.scale", given.scale, 0, MAX_CONTROL_SCALE)
    end = given.end if given.HasField("end") else 1.0
    check_interval(field, given.start, end)
    check_range(f"{field}.tensors", len(given.tensors), 1, _MAX_TENSORS)
    tensors = []
    for i, tensor in enumerate(given.tensors):
        path = f"{field}.tensors[{i}]"
        found = from_proto(tensor, path, dtypes=FLOATS, shape=(1, None, None, None))
        for axis in range(1, 4):
            check_range(f"{path}.shape[{axis}]", found.shape[axis], 1, MAX_SIDE)
        tensors.append(require_finite(found, path))
    return PictureFeatures(tuple(tensors), given.scale, given.start, end)
