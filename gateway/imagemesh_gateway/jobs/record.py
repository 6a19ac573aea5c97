"""A job as it stands in the store."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where a job is; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether it stays so."""
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True)
class NewJob:
    """What is known of a job when it is accepted; times are seconds since 1970."""

    id: str
    # None: no idempotency key.
    key: str | None
    # SHA-256 of the request as it was sent.
    digest: bytes
    # A GenerateRequest with everything drawn, and the same without its pictures; serialised.
    request: bytes
    summary: bytes
    created: float
    # When its turn comes, were it alone: created plus the patience of its priority.
    due: float
    deadline: float | None
    # Seconds to keep it for once it is finished.
    retention: float
    # Whose it is, and the id of the key that it was made with; empty where keys are off.
    tenant: str = ""
    owner: str = ""
    # What it samples with, and how much: ``costs.amount``.
    model: str = ""
    amount: float = 0.0
    # The trace that it goes on with, as a traceparent header has it.
    trace: str = ""


@dataclass(frozen=True)
class Waiting:
    """The queued jobs of one model, and how much they are to sample together."""

    model: str
    jobs: int
    amount: float


@dataclass(frozen=True)
class Record:
    """A job without its request and its pictures; times are seconds since 1970."""

    seq: int
    id: str
    state: State
    # Counts the attempts; only the attempt that holds the latest number may finish the job.
    fence: int
    # Attempts that failed for a reason that may pass.
    failures: int
    digest: bytes
    summary: bytes
    created: float
    due: float
    started: float | None
    finished: float | None
    deadline: float | None
    expires: float | None
    error_code: int
    error_message: str
    # A GenerateResult without the bytes of its pictures, serialised.
    result: bytes | None
    # Whose it is.
    tenant: str
    trace: str
