"""Peak memory of ``imagemesh up`` over that of the pipeline in one process, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from imagemesh_client import Client
from tests.bench.harness import Figure
from tests.bench.models import NAME
from tests.bench.up import up

_PIPELINE = """
import sys, torch, diffusers
pipe = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
with torch.inference_mode():
    pipe("a red fox", num_inference_steps=20, generator=torch.Generator().manual_seed(1))
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def measure(models: Path, rounds: int, name: str = NAME) -> list[Figure]:
    """A generation in each, then the peak."""
    alone, mesh = [], []
    for _ in range(rounds):
        command = [sys.executable, "-c", _PIPELINE, str(models / name)]
        env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        child = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        alone.append(int(child.stdout.split()[-1]) / 1024)
        with up(models) as running, Client(running.address) as client:
            client.generate("a red fox", model=name, steps=20, guidance=7.5, seed=1)
            mesh.append(running.peak_bytes() / 2**20)
    return [
        Figure.of("memory: peak of diffusers' pipeline in one process", alone, "MiB"),
        Figure.of("memory: peak of imagemesh up", mesh, "MiB"),
        Figure.of("memory: mesh / in-process", [b / a for a, b in zip(alone, mesh, strict=True)], "x", "<= 1.3"),
    ]
