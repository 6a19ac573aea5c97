"""What of a scheduler a request may set."""

import inspect
from collections.abc import Mapping

import diffusers
import pytest

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.backends.torch.flow_schedulers import for_flow, for_noise
from imagemesh_services.diffusion.scheduler_options import FLOW_SHIFT, OPTIONS, Option, with_options
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler

# Of diffusers' own options: what the model was trained with, what is for flow models, and what no request should set.
OTHERS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "variance_type", "use_flow_sigmas", "use_dynamic_shifting", "time_shift_type", "shift_terminal",
    "sigma_min", "sigma_max", "timestep_type", "timestep_scaling", "original_inference_steps", "lambda_min_clipped",
    "noise_sampler_seed", "tau_func", "solver_p", "disable_corrector", "predict_x0", "algorithm_type", "solver_type",
}  # fmt: skip


def test_every_class_of_the_list_is_there() -> None:
    assert set(OPTIONS) == {choice.class_name for choice in SCHEDULERS.values()}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_table_has_all_that_the_class_takes_and_nothing_else(name: str) -> None:
    cls = getattr(diffusers, name)
    taken = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if "eta" in inspect.signature(cls.step).parameters:
        taken.add("eta")
    taken -= {FLOW_SHIFT}  # see below
    assert set(OPTIONS[name]) - {FLOW_SHIFT} <= taken
    assert taken - set(OPTIONS[name]) <= OTHERS


CASES = [(name, option) for name, options in OPTIONS.items() for option in options if option not in ("eta", FLOW_SHIFT)]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_diffusers_takes_every_value(name: str, option: str) -> None:
    one: Option = OPTIONS[name][option]
    values: tuple[object, ...] = one.names or ((True, False) if one.kind is bool else (one.kind(one.high),))
    for value in values:
        needs = {"final_sigmas_type": "sigma_min"} if value in ("dpmsolver", "sde-dpmsolver") else {}
        made = getattr(diffusers, name).from_config(diffusers.PNDMScheduler().config, **{option: value}, **needs)
        assert made.config[option] == value


FLOW = {
    "steady": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "by size": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
}


@pytest.mark.parametrize("own", FLOW)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_flow_shift_is_asked_of_all_that_flow_models_can_use_and_of_no_other(name: str, own: str) -> None:
    plain = find_scheduler(name)
    try:
        for_flow(plain, FLOW[own])
    except InvalidArgument:
        assert FLOW_SHIFT not in OPTIONS[name]
        return
    shifted = for_flow(with_options(plain, {FLOW_SHIFT: "5"}), FLOW[own])
    assert shifted is not None
    made = getattr(diffusers, shifted.class_name).from_config(FLOW[own].config, **shifted.options)
    assert made.config["shift" if "FlowMatch" in shifted.class_name else FLOW_SHIFT] == 5
    takes = inspect.signature(type(made).__init__).parameters
    assert not ("use_dynamic_shifting" in takes and made.config.use_dynamic_shifting)


def test_a_model_of_noise_predictions_has_no_flow_to_shift() -> None:
    with pytest.raises(InvalidArgument, match=r"scheduler_options\['flow_shift'\] must be absent"):
        for_noise(with_options(find_scheduler("Euler"), {FLOW_SHIFT: "5"}))
    assert for_noise(find_scheduler("Euler")) is SCHEDULERS["Euler"]


def test_options_lie_over_what_the_name_stands_for() -> None:
    made = with_options(find_scheduler("DPM++ 2M Karras"), {"solver_order": "3", "timestep_spacing": '"trailing"'})
    assert made is not None
    assert made.options["solver_order"] == 3
    assert made.options["timestep_spacing"] == "trailing"
    assert made.options["use_karras_sigmas"] is True


def test_another_spacing_takes_the_place_of_the_names() -> None:
    made = with_options(find_scheduler("DPM++ 2M Karras"), {"use_beta_sigmas": "true"})
    assert made is not None
    assert (made.options["use_karras_sigmas"], made.options["use_beta_sigmas"]) == (False, True)


def test_without_options_nothing_changes() -> None:
    assert with_options(find_scheduler("Euler"), {}) is SCHEDULERS["Euler"]
    assert with_options(None, {}) is None


WRONG: dict[str, tuple[str, Mapping[str, str], str]] = {
    "unknown": ("Euler", {"colour": "1"}, "an option that EulerDiscreteScheduler takes: .*interpolation_type"),
    "of another class": ("Euler a", {"solver_order": "2"}, "an option that EulerAncestral"),
    "the model's": ("DDIM", {"beta_start": "0.1"}, "an option that DDIM"),
    "takes none": ("IPNDM", {"eta": "0"}, "it takes none"),
    "not JSON": ("Euler", {"use_karras_sigmas": "yes"}, r"scheduler_options\['use_karras_sigmas'\] .*true or false"),
    "a number for a flag": ("Euler", {"use_karras_sigmas": "1"}, "true or false"),
    "a flag for a number": ("DPM++ 2M", {"solver_order": "true"}, "a whole number from 1 to 3"),
    "a fraction": ("DPM++ 2M", {"solver_order": "1.5"}, "a whole number from 1 to 3"),
    "too much": ("DDIM", {"eta": "2"}, "a number from 0 to 1"),
    "no number": ("DDIM", {"eta": "NaN"}, "a number from 0 to 1"),
    "another word": ("DDIM", {"timestep_spacing": '"odd"'}, '"linspace", "leading", "trailing"'),
    "two spacings": ("Euler", {"use_karras_sigmas": "true", "use_beta_sigmas": "true"}, "one spacing"),
    "deep": ("DDIM", {"eta": "[" * 100_000}, "a number from 0 to 1"),
    "no scheduler": ("", {"eta": "0.5"}, "empty where the request names no scheduler"),
    "too many": ("DDIM", {str(i): "1" for i in range(17)}, "at most 16"),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_options_are_named(how: str) -> None:
    name, given, message = WRONG[how]
    with pytest.raises(InvalidArgument, match=message):
        with_options(find_scheduler(name), given)
