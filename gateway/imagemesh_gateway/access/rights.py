"""What each call needs, over gRPC and over HTTP."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from imagemesh_gateway.access.keys import Role


class Right(IntEnum):
    """Each holds those before it."""

    # Needs no key.
    OPEN = 0
    LOOK = 1
    MAKE = 2
    MANAGE = 3


RIGHTS: Final[Mapping[Role, Right]] = {Role.VIEWER: Right.LOOK, Role.USER: Right.MAKE, Role.ADMIN: Right.MANAGE}

_LOOK, _MAKE, _MANAGE = Right.LOOK, Right.MAKE, Right.MANAGE
# Of the whole service where no method is named. What stands in no line needs MANAGE.
GRPC: Final[Mapping[str, Right]] = {
    # Kubernetes' probes and load balancers have no key.
    "grpc.health.v1.Health": Right.OPEN,
    # They call Check; a watch lasts, and holds a call's place as long.
    "grpc.health.v1.Health/Watch": _LOOK,
    "grpc.reflection.v1.ServerReflection": _LOOK,
    "grpc.reflection.v1alpha.ServerReflection": _LOOK,
    "imagemesh.v1.GatewayService": _MAKE,
    "imagemesh.v1.GatewayService/ListModels": _LOOK,
    "imagemesh.v1.GatewayService/DescribeSampling": _LOOK,
    "imagemesh.v1.JobService": _MAKE,
    "imagemesh.v1.JobService/GetJob": _LOOK,
    "imagemesh.v1.JobService/ListJobs": _LOOK,
    "imagemesh.v1.JobService/WatchJob": _LOOK,
    "imagemesh.v1.LoadService": _LOOK,
    "imagemesh.v1.ModelLoadingService": _MANAGE,
    "imagemesh.v1.PreprocessService": _MAKE,
    "imagemesh.v1.PreprocessService/ListPreprocessors": _LOOK,
    # All tenants search the same indexes, so not everybody may change them.
    "imagemesh.v1.SearchService": _MANAGE,
    "imagemesh.v1.SearchService/ListIndexes": _LOOK,
    "imagemesh.v1.SearchService/SearchImages": _MAKE,
    "imagemesh.v1.SearchService/FindDuplicates": _MAKE,
    "inference.GRPCInferenceService": _LOOK,
    "inference.GRPCInferenceService/ServerLive": Right.OPEN,
    "inference.GRPCInferenceService/ServerReady": Right.OPEN,
    "inference.GRPCInferenceService/ModelInfer": _MAKE,
    "inference.GRPCInferenceService/ModelStreamInfer": _MAKE,
    "inference.GRPCInferenceService/SystemSharedMemoryRegister": _MAKE,
    "inference.GRPCInferenceService/SystemSharedMemoryUnregister": _MAKE,
    "inference.GRPCInferenceService/RepositoryModelLoad": _MANAGE,
    "inference.GRPCInferenceService/RepositoryModelUnload": _MANAGE,
}
# They tell only whether, and what kinds of work are done here.
_OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_INDEX: Final = "/v1/index"


def right_of_method(service: str, method: str) -> Right:
    """What a gRPC method needs."""
    return GRPC.get(f"{service}/{method}", GRPC.get(service, _MANAGE))


def right_of_request(method: str, path: str) -> Right:
    """What an HTTP request needs."""
    if method in _SAFE:
        return Right.OPEN if path in _OPEN_PATHS else _LOOK
    return _MANAGE if path == _INDEX or path.startswith(f"{_INDEX}/") else _MAKE
