"""Guiders at the backend's seam: in a crowd, over a checkpoint, and where they fail."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.backend import BACKENDS, DiffusionModel, Residuals, Run, SampleInputs
from imagemesh_services.diffusion.backends.torch.graphs import GraphDiffusionModel
from imagemesh_services.diffusion.checkpoint import Checkpoint, read_message, to_message
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.guiders import find_guider
from imagemesh_services.diffusion.schedulers import find_scheduler
from tests.support.backends import load_first

# Width of the prompts' embeddings that each backend's model wants.
WIDTHS = {"torch": 32, "onnxruntime": 32, "openvino": 32, "fake": 4}
STEPS = 6
# By what they are called here: name and options.
CASES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "interval": ("CFG", {"start": "0.3", "stop": "0.7"}),
    "rescale": ("CFG", {"guidance_rescale": "0.7"}),
    "zero": ("CFG-Zero*", {"zero_init_steps": "2"}),
    "apg": ("APG", {"adaptive_projected_guidance_momentum": "-0.5", "eta": "0.3"}),
    "apg interval": ("APG", {"adaptive_projected_guidance_momentum": "0.5", "start": "0.4", "stop": "0.8"}),
    "apg mix": ("APG mix", {"adaptive_projected_guidance_start_step": "2"}),
    "tcfg": ("TCFG", {}),
    "pag": ("PAG", {"perturbed_guidance_stop": "0.8"}),
    "slg": ("SLG", {"skip_layer_guidance_stop": "0.8", "skip_layer_guidance_layers": '["mid_block", "up_blocks"]'}),
    "auto": ("Auto", {"dropout": "1", "stop": "0.7"}),
    "auto drawn": ("Auto", {"dropout": "0.4"}),
}
HOOKING = ("pag", "slg", "auto", "auto drawn")


def guided(inputs: SampleInputs, case: str, **changes: object) -> SampleInputs:
    return dataclasses.replace(inputs, guider=find_guider(*CASES[case]), **changes)  # type: ignore[arg-type]


def made_inputs(backend: str) -> SampleInputs:
    numbers = np.random.default_rng(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    conditioning = {name: numbers.normal(size=(1, 5, WIDTHS[backend])).astype(np.float32) for name in names}
    return SampleInputs(conditioning, 64, 64, STEPS, 4.0, None, (7, 8))


@pytest.fixture(params=BACKENDS, scope="module")
def any_model(request: pytest.FixtureRequest, models: Path) -> tuple[DiffusionModel, SampleInputs]:
    return load_first(BACKENDS, request.param, DiffusionConfig, models), made_inputs(request.param)


@pytest.fixture(scope="module")
def model(models: Path) -> DiffusionModel:
    return load_first(BACKENDS, "torch", DiffusionConfig, models)


@pytest.fixture(scope="module")
def other(models: Path) -> DiffusionModel:
    """Another replica's model."""
    return load_first(BACKENDS, "torch", DiffusionConfig, models)


@pytest.fixture
def inputs() -> SampleInputs:
    return made_inputs("torch")


def advance(model: DiffusionModel, run: Run, count: int, residuals: Residuals | None = None) -> None:
    """Residuals are of all rows; as a ControlNet would, they come for those that the evaluation is of."""
    for _ in range(count):
        given = residuals
        if residuals is not None:
            last = slice(-len(run.model_input()[0]), None)
            given = Residuals([part[last] for part in residuals.down], residuals.mid[last])
        assert list(model.advance([run], [given])) == [None]


def finish(model: DiffusionModel, asked: SampleInputs) -> np.ndarray:
    run = model.start(asked)
    advance(model, run, run.evaluations)
    return run.latents()


def test_guidance_in_an_interval_differs_from_guidance_all_the_way_and_none_at_all(any_model):
    model, inputs = any_model
    made = [finish(model, guided(inputs, "interval"))]
    made += [finish(model, dataclasses.replace(inputs, guidance_scale=scale)) for scale in (1.0, 4.0)]
    halves = [dataclasses.replace(inputs, guider=find_guider("", {key: "0.5"})) for key in ("start", "stop")]
    made += [finish(model, one) for one in halves]
    ends_alike = {(1, 4), (2, 3), (0, 1), (0, 4), (1, 2)} if model.fingerprint == "fake" else set()
    for i, one in enumerate(made):
        for j in range(i):
            differs = np.abs(one - made[j]).max() > 1e-2
            assert differs or {(i, j), (j, i)} & ends_alike, (i, j)


def test_an_interval_that_is_never_is_no_guidance(any_model):
    model, inputs = any_model
    never = dataclasses.replace(inputs, guider=find_guider("", {"start": "0.5", "stop": "0.5"}))
    np.testing.assert_allclose(
        finish(model, never), finish(model, dataclasses.replace(inputs, guidance_scale=1.0)), atol=1e-5
    )


def test_runs_with_an_interval_share_forwards_with_others(any_model):
    model, inputs = any_model
    asked = [guided(inputs, "interval"), dataclasses.replace(inputs, guidance_scale=2.0, seeds=(3,))]
    alone = [finish(model, one) for one in asked]
    runs = [model.start(one) for one in asked]
    assert runs[0].key == runs[1].key
    for _ in range(STEPS + 1):
        going = [run for run in runs if run.steps_done() < STEPS]
        if going:
            assert list(model.advance(going, [None] * len(going))) == [None] * len(going)
    for run, latents in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents(), latents, atol=1e-4)


def test_a_backend_refuses_by_name_the_guiders_that_it_does_not_have():
    fake = load_first(BACKENDS, "fake", DiffusionConfig, Path())
    for case, field in (("apg", "guider"), ("rescale", r"guider_options\['guidance_rescale'\]")):
        with pytest.raises(InvalidArgument, match=f"{field} must be .*the fake backend knows"):
            fake.start(guided(made_inputs("fake"), case))


@pytest.mark.parametrize("case", CASES)
def test_every_guider_matters(model, inputs, case):
    plain, made = finish(model, inputs), finish(model, guided(inputs, case))
    assert np.isfinite(made).all()
    assert np.abs(plain - made).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_pictures_of_one_request_are_those_of_single_ones(model, inputs, case):
    singles = [finish(model, guided(inputs, case, seeds=(seed,))) for seed in inputs.seeds]
    np.testing.assert_allclose(finish(model, guided(inputs, case)), np.concatenate(singles), atol=2e-3)


def travel(checkpoint: Checkpoint) -> Checkpoint:
    """As the other replica reads it off the wire."""
    message = to_message(checkpoint, "same")
    return read_message(type(message).FromString(message.SerializeToString()), "same")


@pytest.mark.parametrize("scheduler", ["Euler a", "Heun", "PNDM"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_elsewhere_bit_by_bit(model, other, inputs, case, scheduler):
    asked = guided(inputs, case, scheduler=find_scheduler(scheduler))
    wanted = finish(model, asked)
    for at in (1, 3, model.start(asked).evaluations - 1):
        run = model.start(asked)
        advance(model, run, at)
        frozen = travel(run.checkpoint())
        advance(model, run, 1)  # the checkpoint is no view of a run that goes on
        successor = other.start(asked)
        successor.restore(frozen)
        advance(other, successor, successor.evaluations - at)
        np.testing.assert_array_equal(successor.latents(), wanted, err_msg=f"at {at}")


@pytest.mark.parametrize(
    "average",
    [5, "a", {"list": [1]}, {"tensor": "generator.0", "dtype": "uint8"}, {"array": "latents.1", "dtype": "x"}],
)
def test_a_momentum_that_is_not_this_runs_is_refused(model, inputs, average):
    asked = guided(inputs, "apg")
    run = model.start(asked)
    advance(model, run, 1)
    frozen = run.checkpoint()
    hostile = dataclasses.replace(frozen, state={**frozen.state, "momentum": {"running_average": average}})
    # A tensor that is taken out here is missing where it belongs, which is told there.
    with pytest.raises(InvalidArgument, match=r"resume_from\.(state\.momentum\.running_average|tensors\['generator)"):
        model.start(asked).restore(hostile)


def plain_twin(inputs: SampleInputs, case: str) -> SampleInputs:
    """A request with as many rows in everyone's forward: the same noise of merging for its neighbours."""
    return dataclasses.replace(inputs, guidance_scale=1.0 if case.startswith("auto") else inputs.guidance_scale)


@pytest.mark.parametrize("case", HOOKING)
def test_a_guider_that_changes_the_model_leaves_its_neighbours_as_they_are(model, inputs, case):
    neighbour = dataclasses.replace(inputs, scheduler=find_scheduler("DDIM"), seeds=(3,))
    plain, beside = model.start(neighbour), model.start(neighbour)
    hooking, twin = model.start(guided(inputs, case)), model.start(plain_twin(inputs, case))
    for _ in range(STEPS):
        assert list(model.advance([hooking, beside], [None, None])) == [None, None]
        assert list(model.advance([twin, plain], [None, None])) == [None, None]
    np.testing.assert_array_equal(beside.latents(), plain.latents())


@pytest.mark.parametrize("case", HOOKING)
def test_after_its_forward_the_model_is_what_it_was(model, inputs, case):
    before = finish(model, inputs)
    finish(model, guided(inputs, case))
    np.testing.assert_array_equal(finish(model, inputs), before)


def test_two_that_change_the_model_take_turns_within_a_tick(model, inputs):
    cases = ["pag", "slg", "auto", "auto drawn", "pag"]
    asked = [guided(inputs, case, seeds=(seed,)) for seed, case in enumerate(cases)]
    alone = [finish(model, one) for one in asked]
    runs = [model.start(one) for one in asked]
    for _ in range(runs[0].evaluations):
        assert list(model.advance(runs, [None] * len(runs))) == [None] * len(runs)
    for run, latents in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents(), latents, atol=2e-3)


@pytest.mark.parametrize("case", HOOKING)
def test_where_a_changed_model_fails_its_request_fails_alone(model, inputs, case):
    """The second of its layers is not there, which shows when the first one's hooks are on already."""
    before = finish(model, inputs)
    failing, beside, plain = model.start(guided(inputs, case)), model.start(inputs), model.start(inputs)
    twin = model.start(plain_twin(inputs, case))
    guider = failing.guidance._guider
    layers = guider.auto_guidance_config if case.startswith("auto") else guider.skip_layer_config
    layers.append(dataclasses.replace(layers[0], fqn="mid_block.nowhere"))
    guider.__dict__["_auto_guidance_hook_names" if case.startswith("auto") else "_skip_layer_hook_names"].append("two")
    faults = [None, None]
    while faults[0] is None:  # skipping begins at the second evaluation
        faults = list(model.advance([failing, beside], [None, None]))
        assert list(model.advance([twin, plain], [None, None])) == [None, None]
    assert isinstance(faults[0], ValueError)
    assert faults[1] is None
    np.testing.assert_array_equal(beside.latents(), plain.latents())
    np.testing.assert_array_equal(finish(model, inputs), before)


@pytest.mark.parametrize("case", ["pag", "slg", "auto"])
def test_layers_that_the_model_has_not_are_named_with_those_it_has(model, inputs, case):
    name = f"{find_guider(*CASES[case]).prefix or 'auto_guidance_'}layers"
    guider = find_guider(CASES[case][0], {name: '["mid_block", "down_blocks.9"]'})
    has = r"down_blocks\.0\.attentions\.0, .*mid_block\.attentions\.0, .*up_blocks"
    with pytest.raises(InvalidArgument, match=rf"guider_options\['{name}'\] must be .*{has}.*got 'down_blocks.9'"):
        model.start(dataclasses.replace(inputs, guider=guider))


def residuals(rows: int, value: float) -> Residuals:
    """In the shapes of tiny-sd's UNet."""
    down = [(32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4)]
    each = np.linspace(value, 2 * value, rows, dtype=np.float32)[:, None, None, None]
    full = [np.broadcast_to(each, (rows, *shape)).copy() for shape in (*down, (64, 4, 4))]
    return Residuals(full[:-1], full[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_controlnet_is_shown_the_rows_that_run_and_no_others(any_model, case):
    model, inputs = any_model
    if model.fingerprint == "fake" and case != "interval":
        return  # it knows no other guider
    asked = guided(inputs, case)
    if isinstance(model, GraphDiffusionModel) and case in HOOKING:
        with pytest.raises(InvalidArgument, match="guider must be one that leaves the layers as they are"):
            model.start(asked)
        return
    run, rows = model.start(asked), []
    for _ in range(run.evaluations):
        rows.append(len(run.model_input()[0]) // len(asked.seeds))
        advance(model, run, 1)
    start, stop = (int(asked.guider.options[name] * run.evaluations) for name in ("start", "stop"))
    assert rows == [2 if start <= i < stop else 1 for i in range(run.evaluations)]
    assert (1 in rows) == (case in ("interval", "apg interval", "auto"))


@pytest.mark.parametrize("case", ["interval", "pag", "auto", "auto drawn"])
def test_each_pass_gets_the_residuals_of_its_condition(model, inputs, case):
    """Where all rows' residuals are those of the last ones, the negative ones' alone make the difference."""
    asked = guided(inputs, case)
    steered, plain = model.start(asked), model.start(asked)
    advance(model, steered, steered.evaluations, residuals(asked.rows, 0.1))
    advance(model, plain, plain.evaluations)
    assert np.abs(steered.latents() - plain.latents()).max() > 1e-2
    single = [dataclasses.replace(asked, seeds=(seed,)) for seed in asked.seeds]
    whole = residuals(asked.rows, 0.1)
    for i, one in enumerate(single):
        run = model.start(one)
        mine = Residuals([part[i::2] for part in whole.down], whole.mid[i::2])
        advance(model, run, run.evaluations, mine)
        np.testing.assert_allclose(run.latents()[0], steered.latents()[i], atol=2e-3)
