"""Create a virtual environment and install torch and imagemesh into it.

Where torch's wheels come from differs: plain PyPI has CUDA builds of several gigabytes. An index given with --index is
used for torch alone; without one, pip's own configuration decides.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"


def main() -> None:
    """Install; later calls bring an existing environment up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--extras", default="all")
    parser.add_argument("--index", default="", help="index to take torch from")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever python3 is here runs this file
        sys.exit(
            f"imagemesh needs Python 3.11 or newer, this is {sys.version.split()[0]}: make install PYTHON=python3.11"
        )
    if not (options.venv / "bin" / "python").exists():
        venv.create(options.venv, with_pip=True)
    pip = [str(options.venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--index-url", options.index] if options.index else []
    print(f"installing {TORCH} and imagemesh[{options.extras}] into {options.venv}; a few minutes", flush=True)
    subprocess.run([*pip, *index, TORCH], check=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[{options.extras}]"], check=True)


if __name__ == "__main__":
    main()
