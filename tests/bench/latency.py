"""The mesh's latency over the same models called in one process without gRPC."""

from pathlib import Path
from time import process_time
from typing import Any

import diffusers
import torch

from imagemesh_client import Client
from tests.bench.harness import Figure, interleave_costs
from tests.bench.models import NAME
from tests.bench.up import up

STEPS = 20
PROMPT = "a red fox"


def measure(models: Path, rounds: int) -> list[Figure]:
    """One arm in this process, one through ``imagemesh up``, in turns."""
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(models / NAME)
    pipe.set_progress_bar_config(disable=True)

    def in_process() -> None:
        with torch.inference_mode():
            pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=7.5, generator=torch.Generator().manual_seed(1))

    with up(models) as mesh, Client(mesh.address) as client:

        def through_the_mesh() -> None:
            client.generate(PROMPT, model=NAME, steps=STEPS, guidance=7.5, seed=1)

        def cpu() -> float:
            return process_time() + mesh.cpu_seconds()

        # A request of each, then of each in the other order: what else the machine does hits both of a pair.
        costs = interleave_costs({"diffusers": in_process, "mesh": through_the_mesh}, rounds, cpu)
    pairs = list(zip(costs["mesh"], costs["diffusers"], strict=True))
    return [
        Figure.of("latency: diffusers' pipeline in one process", [cost.wall for cost in costs["diffusers"]], "s"),
        Figure.of("latency: the mesh (imagemesh up, over gRPC)", [cost.wall for cost in costs["mesh"]], "s"),
        Figure.of("latency: mesh / in-process", [mesh.wall / alone.wall for mesh, alone in pairs], "x", "<= 1.03"),
        Figure.of("latency: mesh / in-process, CPU", [mesh.cpu / alone.cpu for mesh, alone in pairs], "x"),
        Figure.of("latency: what the mesh adds, CPU", [(mesh.cpu - alone.cpu) * 1e3 for mesh, alone in pairs], "ms"),
    ]
