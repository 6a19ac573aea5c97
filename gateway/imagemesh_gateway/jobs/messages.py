"""From records to messages."""

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from imagemesh.v1 import gateway_service_pb2
from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.jobs.record import Record, State
from imagemesh_runtime.errors import InvalidArgument

STATES = {
    State.QUEUED: pb.JOB_STATE_QUEUED,
    State.RUNNING: pb.JOB_STATE_RUNNING,
    State.SUCCEEDED: pb.JOB_STATE_SUCCEEDED,
    State.FAILED: pb.JOB_STATE_FAILED,
    State.CANCELLED: pb.JOB_STATE_CANCELLED,
}
_NAMES: dict[int, State] = {number: state for state, number in STATES.items()}


def job_message(record: Record) -> pb.Job:
    """The job without its position, its progress and its result."""
    request = gateway_service_pb2.GenerateRequest.FromString(record.summary)
    return pb.Job(
        id=record.id,
        state=STATES[record.state],
        request=request,
        priority=request.priority,
        created=_time(record.created),
        started=_time(record.started),
        finished=_time(record.finished),
        deadline=_time(record.deadline),
        expires=_time(record.expires),
        attempts=record.fence,
        error=_error(record),
        tenant=record.tenant,
    )


def states(numbers: Iterable[int]) -> list[State]:
    """The states that a list is narrowed to.

    Raises:
        InvalidArgument: a number that is none.
    """
    found = []
    for i, number in enumerate(numbers):
        if number not in _NAMES:
            allowed = ", ".join(pb.JobState.Name(known) for known in STATES.values())
            raise InvalidArgument(f"states[{i}]", number, allowed)
        found.append(_NAMES[number])
    return found


def _error(record: Record) -> pb.JobError | None:
    if record.state is not State.FAILED:
        return None
    return pb.JobError(code=record.error_code, message=record.error_message)


def _time(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    time = Timestamp()
    time.FromMicroseconds(round(seconds * 1e6))
    return time
