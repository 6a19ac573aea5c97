"""What may be asked of a preprocessor."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument, NotFound
from imagemesh_runtime.preprocessing import check_parameters, check_resolution, find_model, find_preprocessor

INFO = pb.PreprocessorInfo(
    name="ink",
    aliases=["Fine Ink (black)", "ink_v2"],
    parameters=[
        pb.PreprocessorParameter(name="width", type="integer", default_value="3", minimum=1, maximum=9),
        pb.PreprocessorParameter(name="flow", type="number", default_value="0.5", minimum=0, maximum=1),
        pb.PreprocessorParameter(name="wet", type="boolean", default_value="false"),
        pb.PreprocessorParameter(name="pen", type="string", default_value='"nib"', choices=["nib", "brush"]),
    ],
)
DEFAULTS = {"width": 3, "flow": 0.5, "wet": False, "pen": "nib"}


def test_what_is_left_out_has_its_default():
    assert check_parameters(INFO, {}, "parameters") == DEFAULTS
    given_all = {"width": "9", "flow": "1", "wet": "true", "pen": '"brush"'}
    assert check_parameters(INFO, given_all, "parameters") == {"width": 9, "flow": 1, "wet": True, "pen": "brush"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("width", "0", "parameters['width'] must be a whole number from 1 to 9, got '0'"),
        ("width", "10", "from 1 to 9"),
        ("width", "2.0", "whole number"),
        ("width", "true", "whole number"),
        ("width", "", "whole number"),
        ("width", "1" * 100_000, "whole number"),
        ("width", "[" * 100_000, "whole number"),
        ("flow", "NaN", "a number from 0 to 1"),
        ("flow", "-Infinity", "a number from 0 to 1"),
        ("flow", "1.0001", "a number from 0 to 1"),
        ("flow", '"0.5"', "a number from 0 to 1"),
        ("wet", "1", "true or false"),
        ("wet", "null", "true or false"),
        ("pen", '"quill"', 'one of "nib", "brush"'),
        ("pen", "nib", 'one of "nib", "brush"'),
        ("pen", "[]", 'one of "nib", "brush"'),
    ],
)
def test_a_value_that_is_not_allowed_is_named(name, text, said):
    with pytest.raises(InvalidArgument) as caught:
        check_parameters(INFO, {name: text}, "parameters")
    assert said in str(caught.value)
    assert caught.value.field == f"parameters[{name!r}]"
    assert len(str(caught.value)) < 300


def test_a_parameter_that_there_is_not_is_named_with_those_that_there_are():
    with pytest.raises(InvalidArgument, match="width, flow, wet, pen for preprocessor ink, got 'depth'"):
        check_parameters(INFO, {"depth": "1"}, "parameters")


@given(st.dictionaries(st.sampled_from(["width", "flow", "wet", "pen", "other"]), st.text(max_size=20)))
def test_whatever_is_given_the_answer_is_whole_or_an_error(values):
    try:
        found = check_parameters(INFO, values, "parameters")
    except InvalidArgument:
        return
    assert set(found) == set(DEFAULTS)
    assert 1 <= found["width"] <= 9


@given(st.integers(1, 9), st.floats(0, 1), st.booleans(), st.sampled_from(["nib", "brush"]))
def test_every_allowed_value_comes_through(width, flow, wet, pen):
    wanted = {"width": width, "flow": flow, "wet": wet, "pen": pen}
    assert check_parameters(INFO, {name: json.dumps(value) for name, value in wanted.items()}, "p") == wanted


@pytest.mark.parametrize("name", ["ink", "INK", " ink ", "fine ink (black)", "Fine_Ink_(black)", "ink-v2", "Ink V2"])
def test_names_and_aliases_are_found_however_they_are_written(name):
    assert find_preprocessor([INFO], name) == INFO


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(NotFound, match="preprocessor 'inks' not found, perhaps 'ink'; available: ink"):
        find_preprocessor([INFO], "inks")


def test_models_are_the_first_or_the_named_one():
    needy = pb.PreprocessorInfo(name="depth", needs_model=True, models=["a", "b"])
    assert [find_model(needy, name, "model") for name in ("", "b")] == ["a", "b"]
    with pytest.raises(NotFound, match="model for preprocessor depth 'c' not found; available: a, b"):
        find_model(needy, "c", "model")
    with pytest.raises(NotFound, match="model for preprocessor depth 'any' not found; available: none"):
        find_model(pb.PreprocessorInfo(name="depth", needs_model=True), "", "model")


def test_a_model_that_is_not_needed_is_refused():
    assert find_model(INFO, "", "model") == ""
    with pytest.raises(InvalidArgument, match="model must be empty for preprocessor ink"):
        find_model(INFO, "a", "model")


@pytest.mark.parametrize("pixels", [1, 15, 4097, 2**32 - 1])
def test_resolutions_have_bounds(pixels):
    check_resolution("resolution", 0)
    check_resolution("resolution", 512)
    with pytest.raises(InvalidArgument, match="resolution must be 16 to 4096"):
        check_resolution("resolution", pixels)
