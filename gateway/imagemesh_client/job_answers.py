"""From messages about jobs to plain values, and back."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import cast

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_client import answers
from imagemesh_client.job_types import Job, JobFailure, StateName
from imagemesh_client.types import Generation, Progress
from imagemesh_runtime.errors import CODES, InvalidArgument, MeshError, RemoteError

_STATES: dict[int, StateName] = {
    pb.JOB_STATE_QUEUED: "queued",
    pb.JOB_STATE_RUNNING: "running",
    pb.JOB_STATE_SUCCEEDED: "succeeded",
    pb.JOB_STATE_FAILED: "failed",
    pb.JOB_STATE_CANCELLED: "cancelled",
}


def job(message: pb.Job) -> Job:
    """The job in an answer."""
    progress = message.progress
    return Job(
        id=message.id,
        state=_STATES[message.state],
        prompt=message.request.prompt,
        model=message.request.model,
        created=cast(datetime, _time(message, "created")),
        started=_time(message, "started"),
        finished=_time(message, "finished"),
        deadline=_time(message, "deadline"),
        expires=_time(message, "expires"),
        position=message.position,
        progress=Progress(progress.step, progress.steps, tuple(progress.previews)) if progress.steps else None,
        attempts=message.attempts,
        error=_failure(message.error) if message.HasField("error") else None,
        result=answers.generation(message.result) if message.HasField("result") else None,
        tenant=message.tenant,
    )


def outcome(ended: Job) -> Generation:
    """What came of a finished job.

    Raises:
        MeshError: it failed (with the code that it failed for), or was cancelled (CANCELLED).
    """
    if ended.result is not None:
        return ended.result
    if ended.error is not None:
        code, message = grpc.StatusCode[ended.error.code], ended.error.message
    else:
        code, message = grpc.StatusCode.CANCELLED, "it was cancelled"
    raise RemoteError(status_pb2.Status(code=code.value[0], message=f"job {ended.id}: {message}"))


def state_numbers(names: Iterable[StateName]) -> "list[pb.JobState.ValueType]":
    """The states to ask for.

    Raises:
        InvalidArgument: a name that is none.
    """
    numbers = {name: number for number, name in _STATES.items()}
    for name in names:
        if name not in numbers:
            raise InvalidArgument("states", name, ", ".join(numbers))
    return [cast("pb.JobState.ValueType", numbers[name]) for name in names]


def is_passing(error: MeshError) -> bool:
    """Whether the gateway may only be away for a moment."""
    return error.code is grpc.StatusCode.UNAVAILABLE


def may_go_on(error: MeshError) -> bool:
    """Whether a watch that ended so can be taken up again: also when its call lasted as long as one may."""
    return is_passing(error) or error.code is grpc.StatusCode.DEADLINE_EXCEEDED


def _failure(error: pb.JobError) -> JobFailure:
    return JobFailure(CODES.get(error.code, grpc.StatusCode.UNKNOWN).name, error.message)


def _time(message: pb.Job, field: str) -> datetime | None:
    if not message.HasField(field):  # type: ignore[arg-type]
        return None
    time: Timestamp = getattr(message, field)
    return time.ToDatetime(UTC)
