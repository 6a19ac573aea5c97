"""onnxruntime-gpu's wheel, in a folder of its own: on a host without such a device it falls back and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import imagemesh_models
from tests.support.sizes import ROOT

DECODE = """
import logging, sys
import numpy as np
import onnxruntime
logging.basicConfig(level=logging.WARNING)
from imagemesh_services.vae.backend import BACKENDS, MemoryOptions
from imagemesh_services.vae.config import VaeConfig
from imagemesh_runtime.registry import choose_backend
latents = np.random.default_rng(0).normal(size=(1, 16, 8, 8)).astype(np.float32)
made = []
for name, device in (("onnxruntime", "auto"), ("torch", "cpu")):
    config = VaeConfig(models=sys.argv[1], device=device, graphs=sys.argv[2], threads=2)
    backend = choose_backend(BACKENDS, name)(config)
    made.append(backend.load("emoji-sd").decode(latents, MemoryOptions()).astype(int))
    print(name, backend.device)
print("build", "CUDAExecutionProvider" in onnxruntime.get_available_providers())
print("apart", np.abs(made[0] - made[1]).max())
"""


@pytest.mark.timeout(900)
def test_its_wheel_gives_the_same_pictures_wherever_it_runs(tmp_path: Path, figures: dict[str, str]) -> None:
    wheel = tmp_path / "wheel"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", wheel, "onnxruntime-gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    roots = [wheel, *(ROOT / part for part in ("protos/gen", "services", "gateway"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots)), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(imagemesh_models.root()), str(tmp_path / "graphs")],
        env=env, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert told["build"] == "True"
    assert int(told["apart"]) <= 1
    if told["onnxruntime"] == "cpu":
        assert "CUDAExecutionProvider can't be used on this host" in done.stderr
    figures["onnxruntime-gpu ran on"] = told["onnxruntime"]
