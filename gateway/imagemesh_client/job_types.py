"""What the mesh answers about jobs, as plain values."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypedDict

from imagemesh_client.requests import GenerateOptions
from imagemesh_client.types import Generation, Progress

StateName = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class JobTerms(TypedDict, total=False):
    """How a job is to be treated."""

    # The same key again is the same job again. Left out: a drawn one, so that a call that is repeated makes one job.
    idempotency_key: str
    # Seconds after which it fails if it is not finished. None: no limit.
    finish_within: float | None
    # Seconds that the finished job is kept for. None: the gateway's choice.
    keep_for: float | None


class JobOptions(JobTerms, GenerateOptions, total=False):
    """How to generate, and how to treat the job."""


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed: gRPC's name of the code, such as "INVALID_ARGUMENT", and what was wrong."""

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """A job as it stood when it was asked for; times are in UTC.

    Attributes:
        position: jobs that go before it while it is queued.
        progress: while it runs, once a step is done.
        attempts: how often it has begun to run.
        result: of a job that succeeded, where it was asked for by id; lists leave it out.
        tenant: whose it is, where the gateway wants API keys.
    """

    id: str
    state: StateName
    prompt: str
    model: str
    created: datetime
    started: datetime | None
    finished: datetime | None
    deadline: datetime | None
    expires: datetime | None
    position: int
    progress: Progress | None
    attempts: int
    error: JobFailure | None
    result: Generation | None
    tenant: str = ""

    @property
    def done(self) -> bool:
        """Whether its state is final."""
        return self.state not in ("queued", "running")
