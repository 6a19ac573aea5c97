"""A lone request with guidance against diffusers' own pipeline, whose guidance is one concatenated pass."""

from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import diffusers
import torch

from imagemesh_services.diffusion.backend import SampleInputs
from tests.bench.engines import EngineArm, load, request
from tests.bench.harness import Figure, interleave_costs

STEPS, GUIDANCE, SCHEDULER = 20, 7.5, "DDIM"


def measure(root: Path, name: str, side: int, rounds: int) -> list[Figure]:
    """From the prompt's embeddings to the latents: the whole request through an engine, and step against step.

    For the latter the pipeline stands still after each of its steps while our run does the same step on the same
    thread, so that both see the same machine.
    """
    model = load(root, name)
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(root / name)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    inputs = request(pipe.unet.config.cross_attention_dim, side, STEPS, GUIDANCE, SCHEDULER)
    with EngineArm(model) as arm:
        arms = {"diffusers": lambda: draw(pipe, inputs), "engine": lambda: arm.one_after_another([inputs])}
        costs = interleave_costs(arms, rounds, process_time)
    pairs = list(zip(costs["engine"], costs["diffusers"], strict=True))
    wall, cpu = [], []
    for _ in range(max(1, rounds // 2)):
        for ours, theirs in step_by_step(model, pipe, inputs):
            wall.append(ours[0] / theirs[0])
            cpu.append(ours[1] / theirs[1])
    what = f"a lone guided request at {side}x{side}: "
    return [
        Figure.of(f"{what}engine / diffusers, wall", [ours.wall / theirs.wall for ours, theirs in pairs], "x", "<= 1"),
        Figure.of(f"{what}engine / diffusers, CPU", [ours.cpu / theirs.cpu for ours, theirs in pairs], "x"),
        Figure.of(f"{what}step / step, wall", wall, "x", "<= 1"),
        Figure.of(f"{what}step / step, CPU", cpu, "x"),
    ]


def draw(pipe: Any, inputs: SampleInputs, **more: Any) -> None:
    """The same by diffusers."""
    embeds = {name: torch.from_numpy(array) for name, array in inputs.conditioning.items()}
    with torch.inference_mode():
        pipe(
            **embeds, width=inputs.width, height=inputs.height, num_inference_steps=inputs.steps,
            guidance_scale=inputs.guidance_scale, generator=torch.Generator().manual_seed(inputs.seeds[0]),
            output_type="latent", **more,
        )  # fmt: skip


def step_by_step(model: Any, pipe: Any, inputs: SampleInputs) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """(wall, CPU) of our and of the pipeline's step, the first one aside: before it the pipeline prepares."""
    run = model.start(inputs)
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    last = (perf_counter(), process_time())

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        middle = (perf_counter(), process_time())
        assert model.advance([run], [None]) == [None]
        end = (perf_counter(), process_time())
        ours, theirs = ((end[i] - middle[i] for i in (0, 1)), (middle[i] - last[i] for i in (0, 1)))
        pairs.append((tuple(ours), tuple(theirs)))  # type: ignore[arg-type]
        last = end
        return {}

    draw(pipe, inputs, callback_on_step_end=after_step)
    return pairs[1:]
