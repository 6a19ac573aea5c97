"""The mesh's latency over the same models called in one process without gRPC."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from imagemesh_client import Client
from tests.bench.harness import Figure, interleave, ratios
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

        seconds = interleave({"diffusers": in_process, "mesh": through_the_mesh}, rounds)
    return [
        Figure.of("latency: diffusers' pipeline in one process", seconds["diffusers"], "s"),
        Figure.of("latency: the mesh (imagemesh up, over gRPC)", seconds["mesh"], "s"),
        Figure.of("latency: mesh / in-process", ratios(seconds, "mesh", "diffusers"), "x", "<= 1.03"),
    ]
