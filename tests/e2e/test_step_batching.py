"""Requests share every step, and none of them shows in another's picture."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemesh_client import AsyncClient, Control, Generation
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import Residuals, Run, SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel, FakeRun
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import SENDING_SECONDS, Finished, Frozen, Progress, Queued, Terms
from tests.support.mesh import running_mesh
from tests.support.reference import draw, worst

CROWD: Sequence[dict[str, Any]] = (
    {"prompt": "the cat", "scheduler": "DDIM", "steps": 12, "guidance": 3.0, "seed": 12},
    {"prompt": "a dog", "scheduler": "Euler a", "steps": 9, "guidance": 7.5, "seed": 2},
    {"prompt": "the red cat", "scheduler": "DPM++ 2M Karras", "steps": 15, "guidance": 5.0, "seed": 3},
    {"prompt": "a", "scheduler": "Heun", "steps": 7, "guidance": 9.0, "seed": 4},
    {"prompt": "a cat on the dog", "scheduler": "DPM++ SDE", "steps": 8, "guidance": 6.0, "seed": 5},
    {"prompt": "in the red", "scheduler": "PNDM", "steps": 11, "guidance": 1.0, "seed": 6},
    {"prompt": "red", "scheduler": "UniPC", "steps": 10, "guidance": 4.0, "seed": 7},
    {"prompt": "on", "scheduler": "LCM", "steps": 5, "guidance": 2.0, "seed": 8},
)


@pytest.fixture(scope="module")
def mesh(models: Path) -> Any:
    with running_mesh(backend="torch", models=str(models)) as mesh:
        yield mesh


def pixels(generation: Generation) -> np.ndarray:
    return np.asarray(generation.images[0].to_pil())


async def crowd(client: AsyncClient, requests: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    made = await asyncio.gather(*(client.generate(**request) for request in requests))
    return [pixels(generation) for generation in made]


async def test_alone_and_in_a_crowd_of_seven_others_the_picture_is_the_pipelines(mesh: Any, models: Path) -> None:
    async with AsyncClient(mesh.grpc_address) as client:
        together = await crowd(client, CROWD)
        alone = [pixels(await client.generate(**request)) for request in CROWD]
    for request, ours, single in zip(CROWD, together, alone, strict=True):
        theirs = draw(
            models / "tiny-sd", request["prompt"], scheduler_name=request["scheduler"], seeds=[request["seed"]],
            num_inference_steps=request["steps"], guidance_scale=request["guidance"],
        )[0]  # fmt: skip
        assert worst(single, theirs) <= 1, request
        assert worst(ours, theirs) <= 1, request


async def test_controlled_and_uncontrolled_requests_share_steps(
    mesh: Any, models: Path, control_image: Image.Image
) -> None:
    steered = {"prompt": "the cat", "scheduler": "Euler", "steps": 8, "guidance": 5.0, "seed": 9}
    async with AsyncClient(mesh.grpc_address) as client:
        with_control = client.generate(**steered, controls=[Control(control_image)])  # type: ignore[arg-type]
        first, *others = await asyncio.gather(with_control, *(client.generate(**one) for one in CROWD[:4]))
    theirs = draw(
        models / "tiny-sd", "the cat", scheduler_name="Euler", seeds=[9], num_inference_steps=8, guidance_scale=5.0,
        controlnet=models / "tiny-controlnet", control_image=control_image,
    )[0]  # fmt: skip
    assert worst(pixels(first), theirs) <= 1
    for request, made in zip(CROWD, others, strict=False):
        alone = draw(
            models / "tiny-sd", request["prompt"], scheduler_name=request["scheduler"], seeds=[request["seed"]],
            num_inference_steps=request["steps"], guidance_scale=request["guidance"],
        )[0]  # fmt: skip
        assert worst(pixels(made), alone) <= 1


class Counting(FakeDiffusionModel):
    """Notes which runs shared a forward; a seed in ``bad`` fails at its second evaluation."""

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.bad = bad
        self.forwards: list[int] = []

    def advance(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Sequence[Exception | None]:
        self.forwards.append(len(runs))
        faults = list(super().advance(runs, residuals))
        for i, run in enumerate(runs):
            if run.steps_done() == 2 and run._inputs.seeds[0] in self.bad:  # type: ignore[attr-defined]
                faults[i] = FloatingPointError("NaN")
        return faults


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    lane = Lane("test")
    engine = Engine(lane, Metrics("diffusion"), max_rows=8, max_queue=8)
    yield engine
    await engine.close()
    lane.close()


def inputs(steps: int, seed: int = 1, width: int = 64) -> SampleInputs:
    embeds = np.ones((1, 8, 4), dtype=np.float32)
    return SampleInputs({"prompt_embeds": embeds}, width, 64, steps, 1.0, None, (seed,))


async def finish(engine: Engine, model: FakeDiffusionModel, asked: SampleInputs) -> Finished:
    async for event in engine.sample(model, asked):
        last = event
    assert isinstance(last, Finished)
    return last


async def test_eight_generations_take_as_many_forwards_as_the_longest(engine: Engine) -> None:
    model = Counting()
    done = await asyncio.gather(*(finish(engine, model, inputs(steps=3 + i)) for i in range(8)))
    assert [one.evaluations for one in done] == [3 + i for i in range(8)]
    assert len(model.forwards) == 10
    assert model.forwards[:3] == [8, 8, 8]


async def test_a_newcomer_joins_at_the_next_step(engine: Engine) -> None:
    model = Counting()
    first = engine.sample(model, inputs(steps=50))
    assert [await anext(first), await anext(first)] == [Queued(0), Progress(1)]
    second = asyncio.create_task(finish(engine, model, inputs(steps=5, seed=2)))
    async for _ in first:
        pass
    await second
    assert model.forwards.count(2) == 5
    assert len(model.forwards) == 50


async def test_other_sizes_take_turns(engine: Engine) -> None:
    model = Counting()
    await asyncio.gather(
        finish(engine, model, inputs(steps=6)), finish(engine, model, inputs(steps=6, width=128, seed=2))
    )
    assert model.forwards == [1] * 12


async def test_one_bad_row_fails_alone(engine: Engine) -> None:
    model = Counting(bad=[3])
    asked = [finish(engine, model, inputs(steps=5, seed=seed)) for seed in range(1, 5)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in results] == [Finished, Finished, FloatingPointError, Finished]
    alone = await finish(engine, Counting(), inputs(steps=5, seed=1))
    assert np.array_equal(results[0].latents, alone.latents)  # type: ignore[union-attr]


async def test_more_rows_than_fit_wait_their_turn_and_a_full_queue_refuses(engine: Engine) -> None:
    model = Counting()
    running = [engine.sample(model, inputs(steps=200, seed=seed)) for seed in range(8)]
    await asyncio.gather(*(anext(one) for one in running))
    await asyncio.gather(*(anext(one) for one in running))
    waiting = [engine.sample(model, inputs(steps=2, seed=seed)) for seed in range(8)]
    assert [await anext(one) for one in waiting] == [Queued(ahead) for ahead in range(8)]
    with pytest.raises(MeshError, match="queue diffusion is full") as caught:
        await anext(engine.sample(model, inputs(steps=2)))
    assert caught.value.retry_after() is not None
    assert max(model.forwards) == 8
    for one in running:
        await one.aclose()
    for one in waiting:
        assert isinstance([event async for event in one][-1], Finished)


async def test_who_leaves_takes_nobody_along(engine: Engine) -> None:
    model = Counting()
    leaving = engine.sample(model, inputs(steps=100, seed=1))
    staying = asyncio.create_task(finish(engine, model, inputs(steps=10, seed=2)))
    assert [await anext(leaving), await anext(leaving)] == [Queued(0), Progress(1)]
    await leaving.aclose()
    assert (await staying).evaluations == 10
    alone = await finish(engine, Counting(), inputs(steps=10, seed=2))
    assert np.array_equal((await staying).latents, alone.latents)


async def test_nothing_is_done_beyond_a_checkpoint_that_was_not_taken(engine: Engine) -> None:
    model = Counting()
    run = engine.sample(model, inputs(steps=6), None, Terms(every=2))
    while not isinstance(await anext(run), Frozen):
        pass
    await finish(engine, Counting(), inputs(steps=50, seed=2))  # the engine is free for others meanwhile
    assert len(model.forwards) == 2
    assert isinstance([event async for event in run][-1], Finished)
    assert len(model.forwards) == 6


async def test_whoever_confirms_its_checkpoints_goes_on_when_it_has_and_no_sooner(engine: Engine) -> None:
    model, stages = Counting(), []
    async for event in engine.sample(model, inputs(steps=6), None, Terms(every=2, confirm_as="me")):
        if isinstance(event, Frozen):
            taken = event.checkpoint.evaluation
            for name, evaluation in (("", taken), ("you", taken), ("me", taken - 1), ("me", taken + 1)):
                engine.confirm(name, evaluation)
            await finish(engine, Counting(), inputs(steps=20, seed=2))  # the engine is free for others meanwhile
            stages.append((taken, len(model.forwards)))
            engine.confirm("me", taken)
            begun = time.perf_counter()
    assert stages == [(2, 2), (4, 4)]
    assert len(model.forwards) == 6
    assert time.perf_counter() - begun < SENDING_SECONDS
    assert engine._active == []


async def test_those_who_share_a_forward_still_do_after_their_checkpoints(engine: Engine) -> None:
    model = Counting()

    async def taken(seed: int) -> None:
        async for _ in engine.sample(model, inputs(steps=12, seed=seed), None, Terms(every=2)):
            pass

    await asyncio.gather(*(taken(seed) for seed in range(8)))
    assert model.forwards == [8] * 12


async def test_closing_tells_who_is_still_there(engine: Engine) -> None:
    run = engine.sample(Counting(), inputs(steps=1000))
    await anext(run)
    await engine.close()
    with pytest.raises(MeshError, match="diffusion: is going away"):
        async for _ in run:
            pass


class Broken(Counting):
    """Its latents can't be read, or its answers are too few."""

    def __init__(self, *, answers: bool = True) -> None:
        super().__init__()
        self.answers = answers

    def start(self, inputs: SampleInputs) -> FakeRun:
        class BrokenRun(FakeRun):
            def latents(self) -> np.ndarray:
                if self._inputs.seeds[0] == 1:
                    raise RuntimeError("out of memory")
                return super().latents()

        return BrokenRun(inputs)

    def advance(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Sequence[Exception | None]:
        faults = super().advance(runs, residuals)
        return faults if self.answers else []


async def test_a_fault_after_the_last_step_is_its_runs_alone(engine: Engine) -> None:
    model = Broken()
    results = await asyncio.gather(
        *(finish(engine, model, inputs(steps=2 + seed, seed=seed)) for seed in (1, 2)), return_exceptions=True
    )
    assert isinstance(results[0], RuntimeError)
    assert isinstance(results[1], Finished)


async def test_a_backend_that_answers_too_few_leaves_nobody_hanging(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="1 runs gave 0 answers"):
        await finish(engine, Broken(answers=False), inputs(steps=2, seed=2))
    assert (await finish(engine, Counting(), inputs(steps=2))).evaluations == 2


async def test_a_closed_engine_takes_nobody(engine: Engine) -> None:
    await engine.close()
    with pytest.raises(MeshError, match="diffusion: is going away"):
        await finish(engine, Counting(), inputs(steps=2))
