"""What a job keeps of its request."""

from dataclasses import replace
from typing import Any

from google.protobuf.message import Message

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, preprocess_service_pb2
from imagemesh_gateway.jobs.record import NewJob
from imagemesh_gateway.jobs.terms import Terms, new_job
from imagemesh_gateway.plan import ControlPlan, Plan
from imagemesh_gateway.references import ReferencePlan

TERMS = Terms(key=None, digest=b"d", timeout=None, retention=10.0)
PLAN = Plan(
    id="p", model="m", prompt="", negative_prompt="", width=64, height=32, steps=10, guidance_scale=1, scheduler="",
    own_scheduler="", clip_skip=0, seeds=(1,), controls=(ControlPlan("canny", pb.GenerateControl(), 1.0),),
    references=(ReferencePlan(pb.GenerateReference(), "plus", 1.0),),
)  # fmt: skip
PICTURE = image_pb2.Image(encoded=b"a picture")


def put_pictures(message: Any) -> None:
    """Into every field, there and below, that takes one."""
    for field in message.DESCRIPTOR.fields:
        kind = field.message_type
        if kind is None or kind.GetOptions().map_entry:
            continue
        value = getattr(message, field.name)
        one = value if isinstance(value, Message) else value.add()
        if kind is image_pb2.Image.DESCRIPTOR:
            one.CopyFrom(PICTURE)
        else:
            put_pictures(one)


def kept(request: pb.GenerateRequest, plan: Plan = PLAN) -> NewJob:
    return new_job(TERMS, request, plan)


def test_a_jobs_summary_is_without_any_of_its_pictures() -> None:
    request = pb.GenerateRequest(prompt="a fox")
    put_pictures(request)
    job = kept(request)
    assert job.request.count(PICTURE.encoded) == 4
    assert PICTURE.encoded not in job.summary
    told = pb.GenerateRequest.FromString(job.summary)
    assert (told.prompt, told.controls[0].model, told.references[0].adapter) == ("a fox", "canny", "plus")


def test_a_job_keeps_to_the_preprocessors_model_that_its_caller_got() -> None:
    wanted = preprocess_service_pb2.PreprocessRequest(preprocessor="depth", model="allowed")
    plan = replace(PLAN, controls=(replace(PLAN.controls[0], preprocess=wanted),))
    asked = pb.GenerateControl(preprocessor="depth")
    request = pb.GenerateRequest(controls=[asked], references=[pb.GenerateReference()])
    (unit,) = pb.GenerateRequest.FromString(kept(request, plan).request).controls
    assert (unit.preprocessor, unit.preprocessor_model) == ("depth", "allowed")
