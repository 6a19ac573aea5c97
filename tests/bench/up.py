"""``imagemesh up`` as a child process, and what it costs in time and memory."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

FREE = ["--grpc-port", "0", "--http-port", "0"]


@dataclass(frozen=True)
class Up:
    """A running mesh."""

    address: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def lane_and_other_seconds(self) -> tuple[list[float], float]:
        """CPU seconds of each thread of the compute lane, and of all other threads together."""
        lane, other = [], 0.0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(OSError):  # it has ended
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                if (task / "comm").read_text().startswith("lane-"):
                    lane.append(seconds)
                else:
                    other += seconds
        return lane, other

    def peak_bytes(self) -> int:
        return peak_bytes(self.process.pid)


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@contextmanager
def up(models: Path, *options: str) -> Iterator[Up]:
    """``imagemesh up`` on free ports."""
    command = [sys.executable, "-m", "imagemesh_cli.main", "up", "--json", "--models", str(models), *FREE, *options]
    # A repository with a model for one bench alone has services warn that they have none.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "IMAGEMESH_LOG_LEVEL": "ERROR"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert child.stdout is not None
        said = ""
        for line in child.stdout:
            said += line
            if line.rstrip() == "}" or (line.startswith("{") and line.rstrip().endswith("}")):
                break
        yield Up(json.loads(said)["grpc"], psutil.Process(child.pid))
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=60)
