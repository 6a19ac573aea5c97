"""What every diffusion backend promises at its seam."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_services.diffusion.backend import BACKENDS, DiffusionModel, Residuals, Run, SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler
from tests.support.backends import each_with, load_first

# Width of the prompts' embeddings that each backend's model wants.
WIDTHS = {"torch": 32, "onnxruntime": 32, "openvino": 32, "fake": 4}
TOKENS, SIDE, STEPS = 5, 64, 4


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(backend: str, models: Path) -> DiffusionModel:
    return load_first(BACKENDS, backend, DiffusionConfig, models)


@pytest.fixture
def inputs(backend: str) -> SampleInputs:
    names = ("prompt_embeds", "negative_prompt_embeds")
    numbers = np.random.default_rng(0)
    conditioning = {name: numbers.normal(size=(1, TOKENS, WIDTHS[backend])).astype(np.float32) for name in names}
    for embeds in conditioning.values():
        embeds.flags.writeable = False  # as arrays that share a message's memory are
    return SampleInputs(conditioning, SIDE, SIDE, STEPS, 3.0, None, (7,))


def _advance(model: DiffusionModel, run: Run, residuals: Residuals | None = None) -> None:
    assert list(model.advance([run], [residuals])) == [None]


def _finish(model: DiffusionModel, run: Run) -> np.ndarray:
    for _ in range(run.evaluations):
        _advance(model, run)
    return run.latents()


def _residuals(rows: int, value: float) -> Residuals:
    """In the shapes of tiny-sd's UNet; the fake takes any."""
    down = [(32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4)]
    full = [np.full((rows, *shape), value, np.float32) for shape in (*down, (64, 4, 4))]
    return Residuals(full[:-1], full[-1])


def test_a_trial_is_one_row_of_the_size_that_was_asked_for(model):
    run = model.start(model.trial(2 * SIDE, SIDE))
    sample, _ = run.model_input()
    assert sample.shape == (1, 4, SIDE // model.scale_factor, 2 * SIDE // model.scale_factor)
    _advance(model, run)
    assert np.isfinite(run.latents()).all()


def test_latents_are_finite_and_of_the_pictures_size(model, inputs):
    latents = _finish(model, model.start(dataclasses.replace(inputs, width=2 * SIDE, seeds=(7, 8))))
    assert latents.dtype == np.float32
    assert latents.shape == (2, 4, SIDE // model.scale_factor, 2 * SIDE // model.scale_factor)
    assert np.isfinite(latents).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rows_are_pictures_twice_with_guidance(model, inputs, guidance):
    inputs = dataclasses.replace(inputs, guidance_scale=guidance, seeds=(1, 2, 3))
    run = model.start(inputs)
    sample, timestep = run.model_input()
    assert sample.shape[0] == run.embeddings().shape[0] == inputs.rows
    assert isinstance(timestep, float)


def test_negative_rows_come_first(model, inputs):
    embeddings = model.start(inputs).embeddings()
    wanted = [inputs.conditioning["negative_prompt_embeds"][0], inputs.conditioning["prompt_embeds"][0]]
    np.testing.assert_allclose(embeddings, wanted, atol=1e-6)


def test_asking_for_the_model_input_changes_nothing(model, inputs):
    asked = model.start(inputs)
    for _ in range(asked.evaluations):
        first, second = asked.model_input(), asked.model_input()
        np.testing.assert_array_equal(first[0], second[0])
        _advance(model, asked)
    np.testing.assert_array_equal(asked.latents(), _finish(model, model.start(inputs)))


@pytest.mark.parametrize(
    ("backend", "name"), each_with(BACKENDS, [None, *SCHEDULERS], [None, "Heun"]), indirect=["backend"], scope="module"
)
@pytest.mark.parametrize("steps", [2, STEPS])
def test_every_scheduler_counts_up_to_the_steps_asked_for(model, inputs, name, steps):
    run = model.start(dataclasses.replace(inputs, scheduler=find_scheduler(name or ""), steps=steps))
    counts = [run.steps_done()]
    for _ in range(run.evaluations):
        _advance(model, run)
        counts.append(run.steps_done())
    assert counts[0] == 0
    assert counts[-1] == steps
    assert counts == sorted(counts)
    assert np.isfinite(run.latents()).all()


@pytest.mark.parametrize("name", ["Euler a", "DPM++ SDE", "LCM", "DPM++ 2M SDE"])
def test_the_same_seed_gives_the_same_latents_with_schedulers_that_draw(model, inputs, name):
    inputs = dataclasses.replace(inputs, scheduler=find_scheduler(name))
    np.testing.assert_array_equal(_finish(model, model.start(inputs)), _finish(model, model.start(inputs)))


def test_other_seeds_start_from_other_noise(model, inputs):
    samples = [model.start(dataclasses.replace(inputs, seeds=(seed,))).model_input()[0] for seed in (1, 2)]
    assert np.abs(samples[0] - samples[1]).max() > 1e-3


def test_other_prompts_give_other_latents(model, inputs):
    other = {name: -embeds for name, embeds in inputs.conditioning.items()}
    changed = dataclasses.replace(inputs, conditioning=other)
    assert np.abs(_finish(model, model.start(inputs)) - _finish(model, model.start(changed))).max() > 1e-2


def test_guidance_matters(model, inputs):
    weaker = dataclasses.replace(inputs, guidance_scale=1.5)
    assert np.abs(_finish(model, model.start(inputs)) - _finish(model, model.start(weaker))).max() > 1e-2


@pytest.mark.parametrize("name", ["", "Euler a", "DPM++ SDE Karras", "UniPC"])
def test_batch_of_seeds_equals_singles(model, inputs, name):
    inputs = dataclasses.replace(inputs, scheduler=find_scheduler(name), seeds=(1, 2, 3))
    singles = [_finish(model, model.start(dataclasses.replace(inputs, seeds=(seed,)))) for seed in inputs.seeds]
    np.testing.assert_allclose(_finish(model, model.start(inputs)), np.concatenate(singles), atol=1e-4)


def test_runs_taking_turns_do_not_disturb_each_other(model, inputs):
    other = dataclasses.replace(inputs, scheduler=find_scheduler("Euler a"), guidance_scale=1.0, seeds=(9,))
    alone = [_finish(model, model.start(one)) for one in (inputs, other)]
    runs = [model.start(one) for one in (inputs, other)]
    for i in range(max(run.evaluations for run in runs)):
        for run in runs:
            if i < run.evaluations:
                _advance(model, run)
    for run, latents in zip(runs, alone, strict=True):
        np.testing.assert_array_equal(run.latents(), latents)


def test_residuals_of_zero_change_nothing(model, inputs):
    plain, steered = model.start(inputs), model.start(inputs)
    _advance(model, plain)
    _advance(model, steered, _residuals(inputs.rows, 0.0))
    np.testing.assert_allclose(steered.latents(), plain.latents(), atol=1e-6)


def test_residuals_steer(model, inputs):
    plain, steered = model.start(inputs), model.start(inputs)
    _advance(model, plain)
    _advance(model, steered, _residuals(inputs.rows, 0.5))
    assert np.abs(steered.latents() - plain.latents()).max() > 1e-2


def test_conditioning_of_another_width_is_refused_by_name(model, inputs):
    wrong = {name: np.zeros((1, TOKENS, 7), np.float32) for name in inputs.conditioning}
    with pytest.raises(InvalidArgument, match="width 7") as caught:
        model.start(dataclasses.replace(inputs, conditioning=wrong))
    assert "prompt_embeds" in caught.value.field


def test_runs_that_share_forwards_get_what_they_get_alone(model, inputs):
    others = [
        dataclasses.replace(inputs, scheduler=find_scheduler("Euler a"), seeds=(9, 10), steps=STEPS + 2),
        dataclasses.replace(inputs, scheduler=find_scheduler("DPM++ 2M Karras"), guidance_scale=1.0, steps=STEPS - 1),
    ]
    asked = [inputs, *others]
    alone = [_finish(model, model.start(one)) for one in asked]
    runs = [model.start(one) for one in asked]
    assert len({run.key for run in runs}) == 1
    done = 0
    while going := [run for run in runs if done < run.evaluations]:
        assert list(model.advance(going, [None] * len(going))) == [None] * len(going)
        done += 1
    for run, latents in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents(), latents, atol=1e-4)


def test_a_run_without_control_is_the_same_beside_one_with_it(model, inputs):
    alone, beside, steered = (model.start(inputs) for _ in range(3))
    for _ in range(2):
        _advance(model, alone)
        assert list(model.advance([beside, steered], [None, _residuals(inputs.rows, 0.5)])) == [None, None]
    np.testing.assert_allclose(beside.latents(), alone.latents(), atol=1e-4)
    assert np.abs(steered.latents() - alone.latents()).max() > 1e-3


def test_a_run_whose_rows_are_nan_fails_alone(model, inputs):
    good, bad = model.start(inputs), model.start(inputs)
    poisoned = _residuals(inputs.rows, float("nan"))
    faults = list(model.advance([good, bad], [None, poisoned]))
    assert faults[0] is None
    assert isinstance(faults[1], NotFinite)
    assert np.isfinite(good.latents()).all()


def test_runs_of_other_sizes_have_other_keys(model, inputs):
    wide = model.start(dataclasses.replace(inputs, width=2 * SIDE))
    assert wide.key != model.start(inputs).key
