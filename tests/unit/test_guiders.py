"""What of a guider a request may set, and how many passes of the model it wants when."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace

import diffusers.guiders
import pytest

from imagemesh_runtime.errors import InvalidArgument, NotFound
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.backends.torch.guiders import Guidance
from imagemesh_services.diffusion.generation import work_of
from imagemesh_services.diffusion.guiders import CFG, GUIDERS, Guider, Passes, find_guider

# Of the library's options: the scale and whether it is on are the request's; layers are named, not counted.
OTHERS = {
    "guidance_scale", "enabled", "skip_layer_config", "perturbed_guidance_config", "auto_guidance_config",
    "adaptive_projected_guidance_norm_dim",
}  # fmt: skip
# Ours where the library has none, or where diffusers' own PAG pipelines have others.
OUR_DEFAULTS = {
    "perturbed_guidance_layers", "skip_layer_guidance_layers", "auto_guidance_layers", "dropout",
    "perturbed_guidance_scale", "perturbed_guidance_start", "perturbed_guidance_stop",
    "adaptive_projected_guidance_momentum",
}  # fmt: skip
UNET = SimpleNamespace(named_modules=lambda: [("mid_block.attentions.0.transformer_blocks.0", None)])


def taken(guider: Guider) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(diffusers.guiders, guider.class_name).__init__).parameters


@pytest.mark.parametrize("name", GUIDERS)
def test_the_table_has_all_that_the_class_takes_and_nothing_else(name: str) -> None:
    guider = GUIDERS[name]
    library = set(taken(guider)) - {"self"}
    assert set(guider.accepts) <= library
    assert library - set(guider.accepts) <= OTHERS
    for option in set(guider.accepts) - OUR_DEFAULTS:
        assert guider.options[option] == taken(guider)[option].default, option


@pytest.mark.parametrize("name", GUIDERS)
def test_defaults_are_values_that_are_allowed(name: str) -> None:
    guider = GUIDERS[name]
    assert all(guider.accepts[option].takes(value) for option, value in guider.options.items())


@pytest.mark.parametrize("name", ["", "cfg", "CFG", "ClassifierFreeGuidance", "classifierfreeguidance"])
def test_names_are_found_in_any_case_and_none_is_classifier_free_guidance(name: str) -> None:
    assert find_guider(name, {}) == CFG


def test_the_star_of_its_name_may_be_left_out() -> None:
    assert find_guider("cfg-zero", {}).name == "CFG-Zero*"


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"'SEG' not found; available: APG, .*CFG, CFG-Zero\*, PAG, SLG, TCFG"):
        find_guider("SEG", {})


WRONG: dict[str, tuple[str, Mapping[str, str], str]] = {
    "unknown": ("CFG", {"eta": "1"}, "guider_options must be an option that CFG takes: guidance_rescale, start"),
    "not JSON": ("CFG", {"start": "soon"}, r"guider_options\['start'\] must be a number from 0 to 1"),
    "too much": ("CFG", {"guidance_rescale": "1.5"}, r"\['guidance_rescale'\] must be a number from 0 to 1"),
    "no number": ("APG", {"eta": "NaN"}, "a number from 0 to 1"),
    "a flag for a number": ("APG", {"eta": "true"}, "a number from 0 to 1"),
    "a diverging momentum": ("APG", {"adaptive_projected_guidance_momentum": "1"}, "from -0.99 to 0.99"),
    "a start at the end": ("CFG", {"start": "1"}, r"\['start'\] must be below 1"),
    "a start after the stop": ("CFG", {"start": "0.5", "stop": "0.4"}, r"\['start'\] must be .* at most stop, 0.4"),
    "layers' too": ("SLG", {"skip_layer_guidance_start": "0.3"}, "at most skip_layer_guidance_stop, 0.2"),
    "zeros rescaled": ("CFG-Zero*", {"guidance_rescale": "0.5"}, "0 where zero_init_steps is above 0"),
    "no layer": ("PAG", {"perturbed_guidance_layers": "[]"}, "a part of the UNet"),
    "a number of a layer": ("PAG", {"perturbed_guidance_layers": "[7]"}, "a part of the UNet"),
    "a long name": ("PAG", {"perturbed_guidance_layers": '"' + "m" * 201 + '"'}, "a part of the UNet"),
    "too many layers": ("PAG", {"perturbed_guidance_layers": "[" + '"a",' * 32 + '"a"]'}, "a list of 1 to 32"),
    "deep": ("CFG", {"start": "[" * 100_000}, "a number from 0 to 1"),
    "too many": ("CFG", {str(i): "1" for i in range(17)}, "at most 16"),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_options_are_named(how: str) -> None:
    name, given, message = WRONG[how]
    with pytest.raises(InvalidArgument, match=message):
        find_guider(name, given)


def inputs(guider: Guider, scale: float = 5.0, seeds: tuple[int, ...] = (7,)) -> SampleInputs:
    return SampleInputs({}, 64, 64, 10, scale, None, seeds, guider=guider)


INTERVALS = [(0.0, 1.0), (0.25, 0.75), (0.0, 0.5), (0.3, 0.3), (0.33, 1.0)]


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize(("start", "stop"), INTERVALS)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_passes_foretold_are_those_that_the_librarys_guider_asks_for(name, start, stop, scale):
    prefixes = {"", GUIDERS[name].prefix}
    given = {f"{prefix}{key}": str(value) for prefix in prefixes for key, value in (("start", start), ("stop", stop))}
    asked = inputs(find_guider(name, given), scale)
    guidance = Guidance(asked, UNET)
    for evaluations in (1, 2, 7, 19):
        stretches = asked.guider.stretches(asked.guided, evaluations)
        foretold = [passes for count, passes in stretches for _ in range(count)]
        assert len(foretold) == evaluations
        for i, passes in enumerate(foretold):
            wanted = guidance.begin(i, evaluations, None)  # type: ignore[arg-type]
            assert passes == Passes(len(wanted.shared), len(wanted.own)) == asked.passes(i, evaluations)


def test_an_interval_halves_the_rows_outside_it() -> None:
    work = work_of(inputs(find_guider("", {"start": "0.2", "stop": "0.6"}), seeds=(1, 2)), "k", 0, 10)
    assert work.peak == 4
    parts = []
    part = work
    while part is not None:
        parts.append((part.rows, part.evaluations, part.own))
        part = part.then  # type: ignore[assignment]
    assert parts == [(2, 2, 0), (4, 4, 0), (2, 4, 0)]


def test_what_is_behind_costs_nothing_any_more() -> None:
    work = work_of(inputs(find_guider("", {"stop": "0.6"})), "k", 7, 10)
    assert (work.rows, work.evaluations, work.then) == (1, 3, None)


@pytest.mark.parametrize(("dropout", "forwards"), [(1, 1), (0.5, 3)])
def test_a_changed_model_costs_forwards_of_its_own(dropout: float, forwards: int) -> None:
    work = work_of(inputs(find_guider("Auto", {"dropout": str(dropout)}), seeds=(1, 2, 3)), "k", 0, 4)
    assert (work.rows, work.own) == (6, forwards)


@pytest.mark.parametrize(("start", "first"), [("0", 0), ("0.1", 2)])
def test_perturbing_from_0_on_means_from_the_first_evaluation_on(start: str, first: int) -> None:
    guider = find_guider("PAG", {"perturbed_guidance_start": start})
    assert [guider.passes(True, i, 10).own for i in range(10)] == [0] * first + [1] * (10 - first)
