"""Prompts that change with the step: what every diffusion backend, and its checkpoints, promise."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import map_to_proto
from imagemesh_services.diffusion.backend import BACKENDS, DiffusionModel, ImageInputs, Run, SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.requests import read_inputs
from imagemesh_services.diffusion.schedulers import find_scheduler
from tests.support.backends import each_with, load_first

# Width of the prompts' embeddings that each backend's model wants.
WIDTHS = {"torch": 32, "onnxruntime": 32, "openvino": 32, "fake": 4}
STEPS = 6


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(backend: str, models: Path) -> DiffusionModel:
    return load_first(BACKENDS, backend, DiffusionConfig, models)


@pytest.fixture
def inputs(backend: str) -> SampleInputs:
    """The prompt changes after two steps, the negative one at each."""
    numbers = np.random.default_rng(0)
    conditioning = {
        name: numbers.normal(size=(2, 5, WIDTHS[backend])).astype(np.float32)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    conditioning["prompt_phases"] = np.array([0, 0, 1, 1, 1, 1], np.int32)
    conditioning["negative_prompt_phases"] = np.array([0, 1, 0, 1, 0, 1], np.int32)
    return SampleInputs(conditioning, 64, 64, STEPS, 3.0, None, (7, 8))


def at(inputs: SampleInputs, prompt: int, negative: int) -> SampleInputs:
    """With these rows alone."""
    rows = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    told = {name: inputs.conditioning[name][row : row + 1] for name, row in rows.items()}
    return dataclasses.replace(inputs, conditioning=told)


def advance(model: DiffusionModel, run: Run, count: int | None = None) -> Run:
    for _ in range(run.evaluations if count is None else count):
        assert list(model.advance([run], [None])) == [None]
    return run


def test_each_step_is_told_its_own_rows(model, inputs):
    run = model.start(dataclasses.replace(inputs, scheduler=find_scheduler("DDIM")))
    for prompt, negative in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (1, 1)]:
        wanted = model.start(at(inputs, prompt, negative)).embeddings()
        np.testing.assert_array_equal(run.embeddings(), wanted)
        advance(model, run, 1)


@pytest.mark.parametrize("scheduler", ["Heun", "PNDM", "DDIM"])
def test_the_phase_changes_with_the_users_steps(model, inputs, scheduler):
    run = model.start(dataclasses.replace(inputs, scheduler=find_scheduler(scheduler)))
    seen = []
    for _ in range(run.evaluations):
        seen.append((run.steps_done(), run.phase))
        advance(model, run, 1)
    wanted = list(zip([0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1], strict=True))
    assert seen == [(step, wanted[step]) for step, _ in seen]
    assert {step for step, _ in seen} == set(range(STEPS))


def test_rows_that_are_alike_are_a_prompt_that_does_not_change(model, inputs):
    alike = {
        name: array[:1].repeat(2, axis=0) if "embeds" in name else array for name, array in inputs.conditioning.items()
    }
    changing = advance(model, model.start(dataclasses.replace(inputs, conditioning=alike)))
    np.testing.assert_array_equal(changing.latents(), advance(model, model.start(at(inputs, 0, 0))).latents())


def test_an_image_begins_in_the_midst_of_the_schedule(model, inputs):
    latents = np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)
    image = ImageInputs(latents, strength=0.5)
    run = model.start(dataclasses.replace(inputs, image=image, scheduler=find_scheduler("DDIM")))
    assert run.phase == (1, 1)
    advance(model, run, 1)
    assert run.phase == (1, 0)


@pytest.mark.parametrize("done", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("backend", "scheduler"),
    each_with(BACKENDS, ["Heun", "Euler a", "PNDM"], ["Heun"]),
    indirect=["backend"],
    scope="module",
)
def test_a_run_goes_on_in_its_phase(model, inputs, scheduler, done):
    inputs = dataclasses.replace(inputs, scheduler=find_scheduler(scheduler))
    first = advance(model, model.start(inputs), done)
    second = model.start(inputs)
    second.restore(first.checkpoint())
    np.testing.assert_array_equal(second.embeddings(), first.embeddings())
    rest = first.evaluations - done
    np.testing.assert_array_equal(advance(model, second, rest).latents(), advance(model, first, rest).latents())


def test_runs_in_other_phases_share_forwards(model, inputs):
    asked = [inputs, at(inputs, 1, 1), dataclasses.replace(inputs, seeds=(3,), scheduler=find_scheduler("Euler a"))]
    alone = [advance(model, model.start(one)).latents() for one in asked]
    runs = [model.start(one) for one in asked]
    assert len({run.key for run in runs}) == 1
    done = 0
    while going := [run for run in runs if done < run.evaluations]:
        assert list(model.advance(going, [None] * len(going))) == [None] * len(going)
        done += 1
    for run, latents in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents(), latents, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_prompts_of_other_lengths_share_forwards_and_nobody_sees_the_padding(model, inputs, guidance):
    short, long = (of_length(inputs, tokens, guidance) for tokens in (77, 154))
    asked = [short, long, dataclasses.replace(short, seeds=(3, 4))]
    alone = [advance(model, model.start(one)).latents() for one in asked]
    runs = [model.start(one) for one in asked]
    assert len({run.key for run in runs}) == 1
    while runs[0].steps_done() < STEPS:
        assert list(model.advance(runs, [None] * len(runs))) == [None] * len(runs)
    for run, latents in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents(), latents, atol=1e-4)
    # Where the padding is seen, it shows.
    unmasked = advance(model, model.start(padded(short, 154))).latents()
    assert np.abs(unmasked - alone[0]).max() > 1e-3


def of_length(inputs: SampleInputs, tokens: int, guidance: float) -> SampleInputs:
    numbers = np.random.default_rng(tokens)
    width = inputs.conditioning["prompt_embeds"].shape[-1]
    names = ("prompt_embeds", "negative_prompt_embeds")
    told = {name: numbers.normal(size=(1, tokens, width)).astype(np.float32) for name in names}
    return dataclasses.replace(inputs, conditioning=told, guidance_scale=guidance)


def padded(inputs: SampleInputs, tokens: int) -> SampleInputs:
    told = {
        name: np.pad(one, ((0, 0), (0, tokens - one.shape[1]), (0, 0))) for name, one in inputs.conditioning.items()
    }
    return dataclasses.replace(inputs, conditioning=told)


def sample_request(inputs: SampleInputs, **changes: np.ndarray) -> pb.SampleRequest:
    conditioning = map_to_proto({**inputs.conditioning, **changes})
    return pb.SampleRequest(
        conditioning=conditioning, width=64, height=64, steps=STEPS, guidance_scale=3.0, seeds=[7, 8]
    )


def test_a_request_that_tells_phases_is_read(model, inputs):
    found = read_inputs(sample_request(inputs), model)
    assert {name: array.tolist() for name, array in found.conditioning.items()} == {
        name: array.tolist() for name, array in inputs.conditioning.items()
    }


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"prompt_phases": np.zeros(5, np.int32)}, "conditioning['prompt_phases'].shape", r"\[6\], got \[5\]"),
        ({"prompt_phases": np.zeros(6, np.int64)}, "conditioning['prompt_phases'].dtype", "int32"),
        ({"prompt_phases": np.full(6, 2, np.int32)}, "conditioning['prompt_phases']", "rows 0 to 1, got 'rows 2 to 2'"),
        ({"negative_prompt_phases": np.full(6, -1, np.int32)}, "conditioning['negative_prompt_phases']", "rows 0 to 1"),
    ],
)
def test_phases_that_can_not_be_are_named(model, inputs, changes, field, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_inputs(sample_request(inputs, **changes), model)
    assert caught.value.field == field


def test_several_rows_without_phases_are_refused(model, inputs):
    request = sample_request(inputs)
    del request.conditioning["prompt_phases"]
    with pytest.raises(InvalidArgument, match=r"conditioning\['prompt_embeds'\].shape must be \[1, any, any\]"):
        read_inputs(request, model)
