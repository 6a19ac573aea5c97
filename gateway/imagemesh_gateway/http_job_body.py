"""Jobs as JSON has them: what is sent to make one, and what is told of it."""

import base64
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from google.rpc import code_pb2
from pydantic import Field

from imagemesh.v1 import gateway_service_pb2, priority_pb2
from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.http_body import ALLOWED, GenerateBody, Text
from imagemesh_gateway.http_media import rejected_json, seen_json
from imagemesh_gateway.jobs.record import State
from imagemesh_gateway.jobs.terms import MAX_KEY_CHARACTERS
from imagemesh_gateway.json_values import shown
from imagemesh_runtime.limits import MAX_STEPS

_SECONDS = "a number of seconds above 0"
# What the fields of JobBody may be, for errors to say.
JOB_ALLOWED: Final = {
    **ALLOWED,
    "preview_every": f"0 to {MAX_STEPS}",
    "idempotency_key": f"at most {MAX_KEY_CHARACTERS} characters",
    "timeout_seconds": _SECONDS,
    "retention_seconds": _SECONDS,
}
_TERMS: Final = ("idempotency_key", "timeout_seconds", "retention_seconds")
_TIMES: Final = ("created", "started", "finished", "deadline", "expires")


class JobBody(GenerateBody):
    """What to generate, and for how long to wait for it and keep it."""

    preview_every: int = Field(0, ge=0, le=MAX_STEPS, description="Steps between two previews; 0: none.")
    idempotency_key: Text = Field("", max_length=MAX_KEY_CHARACTERS, description="A second job with it is the first.")
    timeout_seconds: float | None = Field(None, gt=0, allow_inf_nan=False, description="Fail it if not done by then.")
    retention_seconds: float | None = Field(None, gt=0, allow_inf_nan=False, description="Keep it so long when done.")

    def fields(self) -> dict[str, Any]:
        """What was given of the generation."""
        return {name: value for name, value in super().fields().items() if name not in _TERMS}

    def to_create(self, key: str) -> pb.CreateJobRequest:
        """The same as a message, with ``key`` as its idempotency key."""
        return pb.CreateJobRequest(
            generate=self.to_proto(),
            idempotency_key=key,
            timeout_seconds=self.timeout_seconds,
            retention_seconds=self.retention_seconds,
        )


def state_number(name: State) -> "pb.JobState.ValueType":
    """The state as messages have it."""
    return pb.JobState.Value(f"JOB_STATE_{name.upper()}")


def state_name(job: pb.Job) -> str:
    """The job's state in lower case, such as "queued"."""
    return pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()


def job_json(job: pb.Job) -> dict[str, Any]:
    """The job; of its result where the pictures are, and not their bytes."""
    told: dict[str, Any] = {"id": job.id, "state": state_name(job), "attempts": job.attempts}
    told["priority"] = _priority(job.priority)
    if job.tenant:
        told["tenant"] = job.tenant
    told |= {name: getattr(job, name).ToJsonString() for name in _TIMES if job.HasField(name)}
    told["request"] = request_json(job.request)
    if job.state == pb.JOB_STATE_QUEUED:
        told["position"] = job.position
    if job.HasField("progress"):
        previews = [base64.b64encode(jpeg).decode() for jpeg in job.progress.previews]
        told["progress"] = {"step": job.progress.step, "steps": job.progress.steps, "previews": previews}
    if job.HasField("error"):
        told["error"] = {"code": code_pb2.Code.Name(job.error.code), "message": job.error.message}
    if job.HasField("result"):
        told["images"] = [
            {"url": f"/v1/jobs/{job.id}/images/{i}"} | seen_json(image) for i, image in enumerate(job.result.images)
        ]
        told |= rejected_json(job.result)
    return told


def request_json(request: gateway_service_pb2.GenerateRequest) -> dict[str, Any]:
    """The request with the names and the values of ``GenerateBody``, without pictures."""
    told: dict[str, Any] = MessageToDict(request, preserving_proto_field_name=True)
    for name in ("seed", "variation_seed"):
        if name in told:
            told[name] = int(told[name])
    if "seeds" in told:
        told["seeds"] = [int(seed) for seed in told["seeds"]]
    if "guidance_scale" in told:
        told["guidance"] = told.pop("guidance_scale")
    if "priority" in told:
        told["priority"] = _priority(request.priority)
    if "pooling" in told.get("embed", {}):
        told["embed"]["pooling"] = told["embed"]["pooling"].removeprefix("POOLING_").lower()
    for one in (told, *told.get("controls", ())):
        for name in ("scheduler_options", "guider_options", "preprocessor_parameters"):
            if name in one:
                one[name] = shown(one[name])
    return told


def _priority(number: "priority_pb2.Priority.ValueType") -> str:
    name = priority_pb2.Priority.Name(number).removeprefix("PRIORITY_").lower()
    return "normal" if name == "unspecified" else name
