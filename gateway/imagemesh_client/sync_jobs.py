"""Jobs, for callers without an event loop."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Unpack

from imagemesh_client import job_answers
from imagemesh_client.aio_jobs import AsyncJobs
from imagemesh_client.job_types import Job, JobOptions, StateName
from imagemesh_client.loop_thread import LoopThread
from imagemesh_client.types import Generation, Progress


class Jobs:
    """Generations that the gateway keeps; methods, errors and options are those of ``AsyncJobs``."""

    def __init__(self, jobs: AsyncJobs, thread: LoopThread) -> None:
        self._async = jobs
        self._thread = thread

    def create(self, prompt: str, **options: Unpack[JobOptions]) -> Job:
        """Have a generation accepted. Once this returns, it will be run."""
        return self._thread.run(self._async.create(prompt, **options))

    def get(self, job: str) -> Job:
        """How a job stands, with the pictures if it has succeeded."""
        return self._thread.run(self._async.get(job))

    def list(self, states: Iterable[StateName] = (), limit: int = 50) -> list[Job]:
        """At most ``limit`` jobs in these states (none given: in any), the newest first."""
        return self._thread.run(self._async.list(states, limit))

    def watch(self, job: str) -> Generator[Job, None, None]:
        """How a job stands, now and whenever that changes, until it is finished; the last one has the pictures."""
        return self._thread.iterate(self._async.watch(job))

    def wait(self, job: str, *, on_progress: Callable[[Progress], None] | None = None) -> Generation:
        """The pictures of a job, once it has them; ``on_progress`` is called on the caller's thread."""
        ended: Job | None = None
        with closing(self.watch(job)) as changes:
            for ended in changes:
                if on_progress is not None and ended.progress is not None:
                    on_progress(ended.progress)
        assert ended is not None
        return job_answers.outcome(ended)

    def cancel(self, job: str) -> Job:
        """Cancel a job unless it is finished; the answer tells which of the two it is."""
        return self._thread.run(self._async.cancel(job))
