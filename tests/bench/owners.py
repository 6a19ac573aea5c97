"""A bench's other process."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from select import select
from subprocess import PIPE, Popen, TimeoutExpired

LIMIT = 256 << 20  # bytes of a message, at both ends
# For a process to start and to end; far more than it takes.
START_SECONDS, STOP_SECONDS = 120.0, 30.0


@contextmanager
def owner(address: str, module: str) -> Iterator[str]:
    """A process that runs the module's ``serve``; see ``started``."""
    code = f"import asyncio, sys; from {module} import serve; asyncio.run(serve(sys.argv[1]))"
    with started(module, [sys.executable, "-c", code, address]) as said:
        yield said


@contextmanager
def started(name: str, command: Sequence[str], log: Path | None = None) -> Iterator[str]:
    """A process that runs until its standard input ends; answers the line that it prints when it is ready.

    It has a session of its own: so the scheduler gives each side its share. What it says besides goes to ``log``.

    Raises:
        RuntimeError: it did not start in time.
        TimeoutExpired: it did not end in time, and was killed.
    """
    with log.open("wb") if log else nullcontext() as told:
        child = Popen(command, stdin=PIPE, stdout=PIPE, stderr=told, start_new_session=True)
    try:
        yield _first_line(child, name, log)
    finally:
        try:
            child.communicate(timeout=STOP_SECONDS)
        except TimeoutExpired:
            child.kill()
            child.communicate()
            raise


def _first_line(child: "Popen[bytes]", name: str, log: Path | None) -> str:
    """What the process prints, whole; it prints nothing before."""
    assert child.stdout is not None
    ready, _, _ = select([child.stdout], [], [], START_SECONDS)
    line = os.read(child.stdout.fileno(), 4096).decode().strip() if ready else ""
    if not line:
        said = f": {log.read_text(errors='replace')[-2000:]}" if log else ""
        raise RuntimeError(f"{name} did not start (exit code {child.poll()}){said}")
    return line
