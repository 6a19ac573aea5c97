"""Options that requests carry as JSON: what is none is refused at the door, and no list of jobs breaks on it."""

import json

import pytest
from pydantic import ValidationError

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.http_body import GenerateBody
from imagemesh_gateway.http_job_body import request_json
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.plan import make_plan
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.metrics import Metrics

NO_JSON = [
    "oops",
    "",
    "NaN",
    "-Infinity",
    "1e999",
    '{"a": [NaN]}',
    "[" * 5000,
    '"' + "x" * 10_000 + '"',
    "9" * 5000,
    r'"\ud800"',
]
FIELDS = ["scheduler_options", "guider_options", "preprocessor_parameters"]


def asking(field: str, text: str) -> pb.GenerateRequest:
    if field == "preprocessor_parameters":
        return pb.GenerateRequest(prompt="a cat", controls=[pb.GenerateControl(**{field: {"rho": text}})])
    return pb.GenerateRequest(prompt="a cat", **{field: {"rho": text}})


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: text[:8])
async def test_what_is_no_finite_json_is_refused_before_a_job_is_made_of_it(field: str, text: str) -> None:
    mesh = Mesh(GatewayConfig(), Metrics("gateway"))
    try:
        with pytest.raises(InvalidArgument, match=rf"{field}\['rho'\] must be JSON"):
            await make_plan(asking(field, text), mesh)
    finally:
        await mesh.close()


async def test_options_are_bounded_in_number() -> None:
    mesh = Mesh(GatewayConfig(), Metrics("gateway"))
    many = pb.GenerateRequest(prompt="a cat", scheduler_options={str(i): "1" for i in range(101)})
    try:
        with pytest.raises(InvalidArgument, match="scheduler_options must be at most 100"):
            await make_plan(many, mesh)
    finally:
        await mesh.close()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", ["oops", "NaN", "1e999", "[" * 5000, r'"\ud800"'], ids=lambda text: text[:8])
def test_a_stored_request_is_shown_whatever_it_holds(field: str, text: str) -> None:
    told = request_json(asking(field, text))
    shown = told["controls"][0] if "controls" in told else told
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert shown[field] == {"rho": text}


def test_values_are_shown_as_json_has_them() -> None:
    request = pb.GenerateRequest(scheduler_options={"eta": "0.5", "order": "2", "karras": "true", "kind": '"sde"'})
    told = request_json(request)["scheduler_options"]
    assert told == {"eta": 0.5, "order": 2, "karras": True, "kind": "sde"}


@pytest.mark.parametrize("field", ["scheduler_options", "guider_options"])
@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_the_http_face_takes_finite_numbers_alone(field: str, number: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        GenerateBody(**json.loads(f'{{"prompt": "a cat", "{field}": {{"rho": {number}}}}}'))
