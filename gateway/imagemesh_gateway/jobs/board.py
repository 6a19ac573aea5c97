"""What is known of jobs only while they run, and who wants to hear of them."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.jobs.record import Record


@dataclass
class Running:
    """An attempt under way in this process."""

    record: Record
    progress: pb.JobProgress = field(default_factory=pb.JobProgress)
    # A sampler has done a first step for it.
    begun: bool = False
    task: asyncio.Task[None] | None = None


class Board:
    """The running attempts by job, and an event for each watcher. For one event loop."""

    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        # No more will begin here.
        self.closing = False
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def listen(self, job: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job changes."""
        changed = asyncio.Event()
        self._watchers[job].add(changed)
        try:
            yield changed
        finally:
            self._watchers[job].discard(changed)
            if not self._watchers[job]:
                del self._watchers[job]

    def tell(self, job: str) -> None:
        """Wake who watches the job."""
        for changed in self._watchers.get(job, ()):
            changed.set()

    def tell_waiting(self) -> None:
        """Wake who watches a job that does not run: its position may be another."""
        for job, watchers in list(self._watchers.items()):
            if job not in self.running:
                for changed in watchers:
                    changed.set()
