"""The commands of the gateway image's stages, run in a plain directory: where no container engine is, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dockerfile import commands
from tests.support.sizes import ROOT


@pytest.mark.timeout(900)
def test_the_commands_of_the_gateways_stages_make_a_gateway_without_torch(tmp_path: Path) -> None:
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    env |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "OPENBLAS_"))}
    for name in ("wheel", "gateway-libraries", "installed"):
        for command in commands(name, tmp_path, SERVICE="gateway"):
            # --no-cache-dir is for the image's size; here what pip has kept may be used.
            quick = command.replace("--no-cache-dir ", "")
            done = subprocess.run(
                ["bash", "-euc", quick], cwd=ROOT, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{quick}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    python = tmp_path / "opt" / "imagemesh" / "bin" / "python"
    look = "import importlib.util as u, imagemesh_gateway.service; print(u.find_spec('torch'), u.find_spec('pip'))"
    done = subprocess.run(
        [python, "-I", "-c", look], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("None None\n", "")
    help_text = subprocess.run(
        [python.parent / "imagemesh", "serve", "--help"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "gateway" in help_text
