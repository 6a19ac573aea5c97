"""Prompts change from step to step as they are written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.text_encoder.schedule import MAX_PHASES, Course, is_scheduled, parse_schedule, phases

SYNTAX = st.text(alphabet="ab ()[]:|\\.15-+\n", max_size=120) | st.text(max_size=60)


def at(text: str, steps: int, prior: int = 0) -> list[str]:
    """The prompt at every step."""
    found = phases(parse_schedule(text, "prompt"), Course(steps, prior), "prompt")
    assert len(set(found.texts)) == len(found.texts)
    return [found.texts[row] for row in found.rows]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("[a:b:0.5]", ["a", "a", "b", "b", "b"]),
        ("[a:b:3]", ["a", "a", "a", "b", "b"]),
        ("[a:b: 3 ]", ["a", "a", "a", "b", "b"]),
        ("[a:b:1.0]", ["a"] * 5),
        ("[a:b:0]", ["b"] * 5),
        ("[a:b:-2]", ["b"] * 5),
        ("[a:b:99]", ["a"] * 5),
        ("[a:b:.2]", ["a", "b", "b", "b", "b"]),
        ("x [a::2] y", ["x a y"] * 2 + ["x  y"] * 3),
        ("x [b:2]", ["x "] * 2 + ["x b"] * 3),
        ("x [:b:2]", ["x "] * 2 + ["x b"] * 3),
        ("[a|b]", ["a", "b", "a", "b", "a"]),
        ("[a|b|]c", ["ac", "bc", "c", "ac", "bc"]),
        ("[a|b] [c|d|e]", ["a c", "b d", "a e", "b c", "a d"]),
        ("[a:[b|c]:2]", ["a", "a", "b", "c", "b"]),
        ("[[a:b:1]:c:3]", ["a", "b", "b", "c", "c"]),
        ("([a:b:2]:1.3)", ["(a:1.3)"] * 2 + ["(b:1.3)"] * 3),
        ("[(a:1.2):b:2]", ["(a:1.2)"] * 2 + ["b"] * 3),
        ("[a\\:x:b:2]", ["a\\:x"] * 2 + ["b"] * 3),
        ("[a:b:" + "9" * 5000 + "]", ["a"] * 5),
    ],
)
def test_a_prompt_at_every_step(text: str, prompts: list[str]) -> None:
    assert at(text, 5) == prompts
    assert is_scheduled(parse_schedule(text, "prompt"))


@pytest.mark.parametrize(
    "text",
    ["", "a", "[a]", "[0.5]", "[]", "[a:b]", "[a:b:c:0.5]", "a|b", "a:b:0.5", "[a:b:0.5", "a:b:0.5]", "(a|b:0.5)",
     r"\[a:b:0.5]", "[a:b:1e3]", "[a:b:0.5x]", "([a:b:0.5)]"],
)  # fmt: skip
def test_what_is_no_schedule_is_left_as_it_stands(text: str) -> None:
    assert not is_scheduled(parse_schedule(text, "prompt"))
    assert at(text, 3) == [text] * 3


def test_the_numbers_go_on_in_a_second_pass() -> None:
    assert at("[a:b:0.5] [c:d:1.5] [e:f:5] [g:h:12]", 6, prior=10) == ["b c f g"] * 2 + ["b c f h"] + ["b d f h"] * 3
    assert at("[a:b:1.5]", 10) == ["a"] * 10


def test_turns_begin_anew_in_a_second_pass() -> None:
    assert at("[a|b]", 3, prior=3) == ["a", "b", "a"]


def test_a_thousand_steps_have_two_phases() -> None:
    found = phases(parse_schedule("[a:b:0.25]", "prompt"), Course(1000), "prompt")
    assert list(found.texts) == ["a", "b"]
    assert list(found.rows) == [0] * 250 + [1] * 750


@pytest.mark.parametrize(
    ("text", "steps", "message"),
    [
        ("[" * 33 + "a", 5, r"prompt must be .*at most 32 deep, got .*33 deep at character 33"),
        ("[" + "a|" * 70 + "]", 100, rf"at most {MAX_PHASES} phases, got .*by step 65 of 100"),
        ("[a|b|c] [d|e|f|g] [h|i|j|k|l|m|n]", 100, rf"at most {MAX_PHASES} phases"),
    ],
)
def test_what_is_too_much_is_named(text: str, steps: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        at(text, steps)
    assert caught.value.field == "prompt"


@given(SYNTAX, st.integers(1, 12), st.integers(0, 12))
@settings(max_examples=500)
def test_any_text_is_read_or_refused(text: str, steps: int, prior: int) -> None:
    try:
        found = at(text, steps, prior)
    except InvalidArgument:
        return
    assert len(found) == steps
    if not is_scheduled(parse_schedule(text, "prompt")):
        assert found == [text] * steps
