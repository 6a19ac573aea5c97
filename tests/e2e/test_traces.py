"""One request is one trace, with a span at both ends of each call; and where nobody wants spans there are none."""

import subprocess
import sys
import time
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import gateway_service_pb2_grpc as rpc
from imagemesh.v1 import image_pb2
from imagemesh_runtime import tracing
from imagemesh_runtime.context import Trace
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import to_proto
from tests.support.mesh import running_mesh

SAMPLE, DECODE = "imagemesh.v1.DiffusionService/Sample", "imagemesh.v1.VaeService/DecodeLatents"
ENCODE, CONTROL = "imagemesh.v1.TextEncoderService/EncodeText", "imagemesh.v1.ControlNetService/Control"
GENERATE = "imagemesh.v1.GatewayService/Generate"
# Where it is made, and of which kind it is.
Place = tuple[str, str, str]


@pytest.fixture(scope="module")
def spans() -> dict[str, list[Any]]:
    """Those of some requests by their traces, once all are over."""
    exporter = InMemorySpanExporter()
    tracing.use(SimpleSpanProcessor(exporter))
    try:
        with running_mesh(backend="fake") as mesh:
            over_grpc(mesh.grpc_address, CALL)
            over_http(mesh.http_address, JOB)
    finally:
        tracing.use(None)
    found: dict[str, list[Any]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(f"{span.context.trace_id:032x}", []).append(span)
    return found


CALL, JOB = Trace.start(), Trace.start()
PICTURE = image_pb2.Image(pixels=to_proto(np.zeros((64, 64, 3), np.uint8)))


def over_grpc(address: str, trace: Trace) -> None:
    picture = pb.GenerateControl(model="fake", image=PICTURE)
    request = pb.GenerateRequest(prompt="x", steps=2, controls=[picture])
    with grpc.insecure_channel(address) as channel:
        call = rpc.GatewayServiceStub(channel).Generate(request, metadata=(("traceparent", trace.header),), timeout=60)
        assert [event.WhichOneof("event") for event in call][-1] == "result"


def over_http(address: str, trace: Trace) -> None:
    with httpx.Client(base_url=f"http://{address}", timeout=60) as client:
        body = {"prompt": "x", "steps": 2}
        job = client.post("/v1/jobs", json=body, headers={"traceparent": trace.header}).json()
        until = time.monotonic() + 60
        while client.get(f"/v1/jobs/{job['id']}").json()["state"] != "succeeded":
            assert time.monotonic() < until
            time.sleep(0.05)


def place(span: Any) -> Place:
    return span.resource.attributes["service.name"], span.kind.name, span.name


def test_a_generation_has_a_span_at_both_ends_of_every_hop(spans: dict[str, list[Any]]) -> None:
    found = {place(span): span for span in spans[CALL.trace_id]}
    hops = {
        ENCODE: ("gateway", "text-encoder"), SAMPLE: ("gateway", "diffusion"), CONTROL: ("diffusion", "controlnet"),
        DECODE: ("gateway", "vae"),
    }  # fmt: skip
    for name, (caller, served) in hops.items():
        there, here = found[served, "SERVER", name], found[caller, "CLIENT", name]
        assert there.parent.span_id == here.context.span_id
        assert here.start_time <= there.start_time
    root = found["gateway", "SERVER", GENERATE]
    assert f"{root.parent.span_id:016x}" == CALL.span_id
    for name in (ENCODE, SAMPLE, DECODE):
        assert found["gateway", "CLIENT", name].parent.span_id == root.context.span_id
    assert found["diffusion", "CLIENT", CONTROL].parent.span_id == found["diffusion", "SERVER", SAMPLE].context.span_id


def test_spans_tell_what_calls_cost_and_that_they_went_well(spans: dict[str, list[Any]]) -> None:
    (sample,) = [span for span in spans[CALL.trace_id] if place(span) == ("diffusion", "SERVER", SAMPLE)]
    assert sample.attributes["rpc.grpc.status_code"] == 0
    assert sample.attributes["imagemesh.compute_seconds"] > 0
    assert all(span.status.status_code.name == "UNSET" for span in spans[CALL.trace_id])


def test_a_job_goes_on_with_the_trace_of_who_created_it(spans: dict[str, list[Any]]) -> None:
    found = {place(span): span for span in spans[JOB.trace_id]}
    created, attempt = found["gateway", "SERVER", "POST /v1/jobs"], found["gateway", "INTERNAL", "job"]
    assert f"{created.parent.span_id:016x}" == JOB.span_id
    assert attempt.parent.span_id == created.context.span_id
    assert found["gateway", "CLIENT", SAMPLE].parent.span_id == attempt.context.span_id
    assert found["vae", "SERVER", DECODE].parent.span_id == found["gateway", "CLIENT", DECODE].context.span_id


def test_probes_and_questions_between_services_make_none(spans: dict[str, list[Any]]) -> None:
    names = {span.name for trace in spans.values() for span in trace}
    assert not {name for name in names if name.startswith(("grpc.", "imagemesh.v1.Load"))}


def test_off_nothing_that_makes_spans_is_imported() -> None:
    assert Metrics("x").spans is None
    tracing.configure({})
    script = (
        "import sys, imagemesh_gateway.service, imagemesh_runtime.service as s; s.set_process_defaults();"
        "from imagemesh_runtime.metrics import Metrics; assert Metrics('x').spans is None;"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_another_choice_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="IMAGEMESH_TRACES must be none or otlp, got 'jaeger'"):
        tracing.configure({"IMAGEMESH_TRACES": "jaeger"})
