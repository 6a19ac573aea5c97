"""A run frozen at any evaluation goes on elsewhere, bit by bit, whatever its scheduler."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.backend import BACKENDS, DiffusionModel, SampleInputs
from imagemesh_services.diffusion.checkpoint import read_message, to_message
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler
from tests.support.backends import each_with, load_first
from tests.support.freezing import MODES, advance, every_mode, handed_over, undisturbed

# Width of the prompts' embeddings that each backend's model wants.
WIDTHS = {"torch": 32, "onnxruntime": 32, "openvino": 32, "fake": 4}


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(backend: str, models: Path) -> DiffusionModel:
    return load_first(BACKENDS, backend, DiffusionConfig, models)


@pytest.fixture(scope="module")
def other(backend: str, models: Path) -> DiffusionModel:
    """Another replica's model."""
    return load_first(BACKENDS, backend, DiffusionConfig, models)


@pytest.fixture
def inputs(backend: str) -> SampleInputs:
    return every_mode(WIDTHS[backend])["text to image"]


@pytest.mark.parametrize(
    ("backend", "scheduler"), each_with(BACKENDS, [*SCHEDULERS, None], ["Heun"]), indirect=["backend"], scope="module"
)
def test_a_run_goes_on_from_every_kind_of_checkpoint_bit_by_bit(model, other, inputs, scheduler):
    inputs = dataclasses.replace(inputs, scheduler=find_scheduler(scheduler) if scheduler else None, steps=6)
    _goes_on(model, other, inputs)


@pytest.mark.parametrize(
    ("backend", "case"),
    each_with(
        BACKENDS,
        [*itertools.product(["DPM++ 2M SDE Karras", "Heun", "PNDM", "DPM++ SDE"], MODES[1:])],
        [("DPM++ SDE", "inpainting")],
    ),
    indirect=["backend"],
    scope="module",
)
def test_in_every_mode(model, other, backend, case):
    scheduler, mode = case
    inputs = every_mode(WIDTHS[backend])[mode]
    _goes_on(model, other, dataclasses.replace(inputs, scheduler=find_scheduler(scheduler), steps=6))


def _goes_on(model, other, inputs):
    wanted = undisturbed(model, inputs)
    evaluations = model.start(inputs).evaluations
    for at in sorted({0, 1, evaluations // 2, evaluations - 1}):
        np.testing.assert_array_equal(handed_over(model, other, inputs, at), wanted, err_msg=f"at {at}")


def test_a_checkpoint_of_another_model_or_request_is_refused(model, inputs):
    message = to_message(model.start(inputs).checkpoint(), "another")
    with pytest.raises(InvalidArgument, match=r"resume_from\.fingerprint must be .* got 'another'"):
        read_message(message, model.fingerprint)


def test_two_loads_of_one_model_have_one_fingerprint(model, other):
    assert model.fingerprint == other.fingerprint


@pytest.mark.parametrize("beyond", [0, 2**31])
def test_a_checkpoint_beyond_the_end_is_refused(model, inputs, beyond):
    run = model.start(inputs)
    checkpoint = dataclasses.replace(run.checkpoint(), evaluation=run.evaluations + beyond)
    with pytest.raises(InvalidArgument, match=r"resume_from\.evaluation"):
        model.start(inputs).restore(checkpoint)


@pytest.mark.parametrize(
    "latents", [None, np.zeros((1, 4, 8, 8), np.float32), np.full((2, 4, 8, 8), np.nan, np.float32)]
)
def test_latents_that_are_not_this_runs_are_refused(model, inputs, latents):
    run = model.start(inputs)
    advance(model, run, 1)
    tensors = dict(run.checkpoint().tensors)
    tensors.pop("latents")
    if latents is not None:
        tensors["latents"] = latents
    with pytest.raises(InvalidArgument, match="latents"):
        model.start(inputs).restore(dataclasses.replace(run.checkpoint(), tensors=tensors))


@pytest.mark.parametrize("state", ["", "[1]", "{", "[" * 100_000])
def test_a_state_that_is_no_json_object_is_refused(model, inputs, state):
    message = to_message(model.start(inputs).checkpoint(), "same")
    message.state = state
    with pytest.raises(InvalidArgument, match=r"resume_from\.state"):
        read_message(message, "same")


HOSTILE = {
    "a method": {"step": 1},
    "the configuration": {"_internal_dict": {"list": []}},
    "no attribute": {"colour": "red"},
    "a tensor that isn't there": {"_step_index": {"tensor": "nowhere", "dtype": "float32"}},
    "a huge number": {"_step_index": 10**30},
    "an object": {"_step_index": {"module": "os"}},
    "a deep list": {"_step_index": {"list": [{"list": [{"list": [{"list": [{"list": []}]}]}]}]}},
    "a long list": {"_step_index": {"list": [0] * 5000}},
    "no attributes": [1, 2],
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_state_is_refused_by_its_name(models, how):
    model = load_first(BACKENDS, "torch", DiffusionConfig, models)
    numbers = np.random.default_rng(0).normal(size=(1, 5, 32)).astype(np.float32)
    inputs = SampleInputs({"prompt_embeds": numbers}, 64, 64, 4, 1.0, None, (7,))
    checkpoint = dataclasses.replace(model.start(inputs).checkpoint(), state={"scheduler": HOSTILE[how]})
    json.dumps(checkpoint.state)
    with pytest.raises(InvalidArgument, match=r"resume_from\.state\.scheduler"):
        model.start(inputs).restore(checkpoint)


def test_a_generators_state_of_garbage_is_refused(models):
    model = load_first(BACKENDS, "torch", DiffusionConfig, models)
    numbers = np.random.default_rng(0).normal(size=(1, 5, 32)).astype(np.float32)
    inputs = SampleInputs({"prompt_embeds": numbers}, 64, 64, 4, 1.0, None, (7,))
    checkpoint = model.start(inputs).checkpoint()
    tensors = {**checkpoint.tensors, "generator.0": np.zeros(3, np.uint8)}
    with pytest.raises(InvalidArgument, match="a generator's state"):
        model.start(inputs).restore(dataclasses.replace(checkpoint, tensors=tensors))
