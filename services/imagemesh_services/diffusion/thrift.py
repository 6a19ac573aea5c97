"""A generation's ControlNets asked less often, about fewer rows, or answering in fewer bits: off unless asked for."""

from dataclasses import dataclass

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh_runtime.savings import check_savings


@dataclass(frozen=True)
class Savings:
    """See ``ControlSavings`` of the contract."""

    reuse_steps: int = 1
    conditional_only: bool = False
    residuals: str = ""


def read_savings(request: pb.SampleRequest) -> Savings:
    """The request's, checked.

    Raises:
        InvalidArgument: they are not possible, or there is nothing to save on.
    """
    given = request.control_savings
    check_savings(given, len(request.controls))
    return Savings(max(given.reuse_steps, 1), given.conditional_only, given.residuals)
