"""Write the lock files that the images are installed from: exact versions, each with its hashes.

``python deploy/docker/lock.py`` renews ``locks/``; of torch it knows the builds for CUDA, which is the package index's
own. Other builds come from an index of their own, whose files only it can hash:
``python deploy/docker/lock.py --accel rocm --torch 2.13.0+rocm7.1 --index https://download.pytorch.org/whl/rocm7.1``.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LOCKS = ROOT / "deploy" / "docker" / "locks"
TORCH = "2.13.0"
# What only some of torch's builds depend on.
_BUILDS = re.compile(r"(torch|triton|pytorch-triton[a-z-]*|nvidia-.*|cuda-.*|intel-.*|mkl|tbb|onemkl-.*|dpcpp-.*)==")


def main() -> None:
    """Renew all locks, or that of one build of torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accel", default="", help="renew torch-ACCEL.txt alone")
    parser.add_argument("--torch", default=TORCH, help="torch's version, with its build: 2.13.0+cpu")
    parser.add_argument("--index", default="", help="the index that this build comes from")
    options = parser.parse_args()
    if options.accel:
        index = ["--index", options.index, "--index-strategy", "unsafe-best-match"] if options.index else []
        _write(f"torch-{options.accel}", filter(_BUILDS.match, _compile([f"torch=={options.torch}"], *index)))
        return
    project = str(ROOT / "pyproject.toml")
    _write("gateway", _compile([], project, *_extras("gateway", "otel")))
    worker = _compile([], project, *_extras("torch", "search", "qdrant", "milvus", "otel"))
    _write("worker", (block for block in worker if not _BUILDS.match(block)))
    _write("torch-cuda", filter(_BUILDS.match, worker))
    _write("build", _compile(["hatchling"]))
    _write("sbom", _compile(["cyclonedx-bom"]))


def _extras(*names: str) -> list[str]:
    return [part for name in names for part in ("--extra", name)]


def _compile(requirements: list[str], *options: str) -> list[str]:
    """Blocks of a requirements file, a package with its hashes each, for Linux and the images' Python."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", *options]
    if requirements:
        command += ["-"]
    done = subprocess.run(command, input="\n".join(requirements), text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("--index", "--extra-index"))]
    return re.split(r"\n(?=\S)", "\n".join(lines))


def _write(name: str, blocks: Iterable[str]) -> None:
    text = "\n".join(blocks)
    (LOCKS / f"{name}.txt").write_text(f"# Written by deploy/docker/lock.py; don't edit.\n{text}\n")
    print(f"{name}: {text.count('==')} packages")


if __name__ == "__main__":
    main()
