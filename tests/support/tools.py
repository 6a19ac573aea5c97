"""Programs from PyPI that are installed in environments of their own, below ``.tools``: what they need is not ours."""

import subprocess
import venv
from pathlib import Path

from tests.support.sizes import ROOT


def tool(name: str, package: str) -> Path:
    """The program; it is installed when it is first wanted, which takes a minute or two."""
    folder = ROOT / ".tools" / name
    found = folder / "bin" / name
    if not found.exists():
        venv.create(folder, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", package]
        subprocess.run(pip, check=True, timeout=1800)
    return found
