"""``make triton``: an environment with a real Triton server, which the bench against it needs.

The server comes with nvidia-pytriton. That wants an older numpy than imagemesh, so it has an environment of its own;
and its Python backend wants the system's interpreter: with a Python 3.11.7 of another build it fails for want of
``_recursion_count``.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support.sizes import ROOT

ENVIRONMENT: Final = ROOT / ".tools" / "triton"
PACKAGE: Final = "nvidia-pytriton==0.7.0"
_SUPPORTED: Final = [(3, minor) for minor in range(8, 14)]


class NoTriton(Exception):
    """There is no environment with a Triton server."""

    def __init__(self) -> None:
        super().__init__(f"there is no Triton server to measure against in {ENVIRONMENT}; `make triton` makes it")


def python() -> Path:
    """The environment's interpreter.

    Raises:
        NoTriton: the environment was not made.
    """
    found = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "installed").exists():
        raise NoTriton
    return found


def make(base: str) -> None:
    """Make the environment of an interpreter of the system's, and install the server.

    Raises:
        SystemExit: the server has no backend for such an interpreter.
        CalledProcessError: a step failed.
    """
    command = [base, "-c", "import sys; print(*sys.version_info[:2])"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    major, minor = map(int, said.split())
    if (major, minor) not in _SUPPORTED:
        sys.exit(f"{PACKAGE} has no backend for Python {major}.{minor}; name another interpreter with --python")
    subprocess.run([base, "-m", "venv", "--without-pip", "--clear", str(ENVIRONMENT)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(ENVIRONMENT / "bin" / "python")]
    print(f"installing {PACKAGE} into {ENVIRONMENT}", flush=True)
    subprocess.run([*pip, "install", "--quiet", "--disable-pip-version-check", PACKAGE], check=True)
    (ENVIRONMENT / "installed").write_text(f"{PACKAGE}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.support.triton", description=__doc__)
    parser.add_argument("--python", default="/usr/bin/python3", help="the system's interpreter")
    make(parser.parse_args().python)
