"""Savings on ControlNets are refused where there is none to save on."""

import pytest

from imagemesh.v1 import diffusion_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.plan import ControlPlan, _savings
from imagemesh_runtime.errors import InvalidArgument

REQUEST = pb.GenerateRequest(control_savings=diffusion_service_pb2.ControlSavings(reuse_steps=2))


def unit(once: bool) -> ControlPlan:
    return ControlPlan("model", pb.GenerateControl(), 1.0, once=once)


def test_savings_beside_t2i_adapters_alone_are_refused():
    with pytest.raises(InvalidArgument, match="there is no ControlNet to save on"):
        _savings(REQUEST, [unit(once=True)])


def test_savings_beside_a_controlnet_hold_whatever_else_steers():
    assert _savings(REQUEST, [unit(once=True), unit(once=False)]).reuse_steps == 2
