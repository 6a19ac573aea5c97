"""What an error says of the replica that it came from."""

from collections.abc import Iterator
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2

from imagemesh_runtime.errors import MeshError, NotFinite

# Codes that say more of the replica than of the request.
_BROKEN: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)


def is_lost(error: MeshError, service: str) -> bool:
    """Whether the replica that was asked is itself gone, not a service behind it."""
    if error.code is not grpc.StatusCode.UNAVAILABLE:
        return False
    named = [info.metadata.get("service") for info in _details(error, error_details_pb2.ErrorInfo)]
    return not named or named == [service]


def is_broken(error: MeshError) -> bool:
    """Whether the replica may be; a model's numbers that are too large are the model's or the request's doing."""
    reasons = [info.reason for info in _details(error, error_details_pb2.ErrorInfo)]
    return error.code in _BROKEN and NotFinite.REASON not in reasons


def lacks_model(error: MeshError) -> bool:
    """Whether it has no such model; another one may."""
    kinds = [info.resource_type for info in _details(error, error_details_pb2.ResourceInfo)]
    return error.code is grpc.StatusCode.NOT_FOUND and any(kind.startswith("model") for kind in kinds)


def _details(error: MeshError, kind: type[Any]) -> Iterator[Any]:
    return (one for one in error.details() if isinstance(one, kind))
