"""Brackets weigh words as AUTOMATIC1111 reads them, and no text does harm."""

import gc
import re
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.text_encoder.attention import MAX_DEPTH, Piece, is_plain, literal, parse_attention
from imagemesh_services.text_encoder.emphasis import weigh
from imagemesh_services.text_encoder.schedule import Course, parse_schedule, phases

SYNTAX = st.text(alphabet="ab ()[]:|\\.15-+\nBREAK", max_size=120) | st.text(max_size=60)
DOWN = 1 / 1.1


def read(text: str) -> list[list[tuple[str, float]]]:
    return [[(piece.text, round(piece.weight, 6)) for piece in section] for section in parse_attention(text, "prompt")]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("a (b:1.3)", [("a ", 1), ("b", 1.3)]),
        ("(b: 1.3 ), c", [("b", 1.3), (", c", 1)]),
        ("[b]", [("b", round(DOWN, 6))]),
        ("((b))", [("b", 1.21)]),
        ("(a (b:2):0.5)", [("a ", 0.5), ("b", 1.0)]),
        ("(b:-1)", [("b", -1)]),
        ("(b:.5)", [("b", 0.5)]),
        ("(a b", [("a b", 1.1)]),
        ("a) b] :1.3)", [("a) b] :1.3)", 1)]),
        (r"\(a\) \[b\] \\", [("(a) [b] \\", 1)]),
        (r"a\b", [("ab", 1)]),
        ("a:b", [("a:b", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("ca(t:1.0)s", [("cats", 1)]),
        ("([a)b]", [("a", 1), ("b", round(DOWN, 6))]),
        ("", [("", 1)]),
        ("((a b) (c:1.5))", [("a b", 1.21), (" ", 1.1), ("c", 1.65)]),
    ],
)
def test_weights_are_read_as_its_users_write_them(text: str, pieces: list) -> None:
    assert read(text) == [pieces]


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("BREAK", [[("", 1)], [("", 1)]]),
        ("(a BREAK b:1.2)", [[("a", 1.2)], [("b", 1.2)]]),
        ("a\n BREAK\nBREAK b", [[("a", 1)], [("", 1)], [("b", 1)]]),
        ("BREAKS break", [[("BREAKS break", 1)]]),
    ],
)
def test_break_ends_a_section_in_brackets_too(text: str, sections: list) -> None:
    assert read(text) == sections


def test_a_text_without_signs_is_itself() -> None:
    assert parse_attention("a red fox: on, 3.5 | the {water}", "prompt") == literal("a red fox: on, 3.5 | the {water}")


@given(SYNTAX)
@settings(max_examples=300)
def test_a_plain_text_is_read_literally(text: str) -> None:
    if is_plain(text):
        assert parse_attention(text, "prompt") == literal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(" * 33, r"prompt must be .*at most 32 deep, got .*33 deep at character 33"),
        ("a" + "([" * 20, r"brackets 33 deep at character 34"),
        ("a (fox:11)", r"weights from -10 to 10, got .*weight of 11 at character 7 \(near"),
        ("((a:9):9)", r"weight of 81 at character 7"),
        ("(a:" + "9" * 400 + ")", r"weight of inf"),
    ],
)
def test_what_is_too_much_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        parse_attention(text, "prompt")
    assert caught.value.field == "prompt"


@given(SYNTAX)
@settings(max_examples=500)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        sections = parse_attention(text, "prompt")
    except InvalidArgument:
        return
    assert sections
    assert all(section and all(isinstance(piece, Piece) for piece in section) for section in sections)
    # Nothing but signs is lost.
    kept = "".join(piece.text for section in sections for piece in section)
    letters = re.compile(r"BREAK|[^a-zA-Z]")
    assert letters.sub("", kept).replace("BREAK", "") == letters.sub("", text).replace("BREAK", "")


HOSTILE = {
    "opening": "(",
    "square": "[",
    "closing": ")",
    "pairs": "(a)",
    "crossed": "([a)]",
    "crossed, left open": "([a)",
    "spaces": " ",
    "colons": ":",
    "spaced numbers": ": 1",
    "digits": "1",
    "backslashes": "\\",
    "breaks": " BREAK ",
    "words": "BREAKa",
    "alternations": "[a|b]",
    "switches": "[a:b:0.5]",
    "a bracket of bars": "|",
    "nested": "[" * 31 + "a:b" + ":0.5]" * 31,
}


def seconds(text: str) -> float:
    """Of this thread's own time: what other work the machine does isn't counted."""

    def once() -> float:
        start = time.thread_time()
        with suppress(InvalidArgument):
            parse_attention(text, "p")
        with suppress(InvalidArgument):
            phases(parse_schedule(text, "p"), Course(3), "p")
        return time.thread_time() - start

    gc.disable()
    try:
        return min(once() for _ in range(3))
    finally:
        gc.enable()


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_a_text_of_a_hundred_thousand_characters_takes_time_in_proportion(unit: str) -> None:
    short, long = (unit * (length // len(unit) + 1) for length in (6_250, 100_000))
    # Were the time quadratic, it would be 256 times as much.
    assert seconds(long) < 64 * seconds(short) + 0.001


def test_ten_thousand_brackets_are_refused_or_read() -> None:
    with pytest.raises(InvalidArgument, match="at most 32 deep"):
        parse_attention("(" * 10_000, "prompt")
    assert read("()" * 5_000) == [[("", 1)]]
    assert read(")" * 10_000) == [[(")" * 10_000, 1)]]
    deepest = "(" * (MAX_DEPTH - 9) + "a" + ":1)" * (MAX_DEPTH - 9)
    assert read(deepest) == [[("a", 1)]]


def test_embeddings_are_weighed_and_their_mean_restored() -> None:
    embeds = np.arange(1, 13, dtype=np.float32).reshape(1, 3, 4)
    weights = np.array([[1, 2, 1]], np.float32)
    weighed = embeds * weights[..., None]
    np.testing.assert_allclose(weigh(embeds, weights, [4]), weighed * (embeds.mean() / weighed.mean()), rtol=1e-6)


def test_each_window_and_each_encoder_is_weighed_by_itself() -> None:
    embeds = np.random.default_rng(0).normal(1, 1, (2, 3, 5)).astype(np.float32)
    weights = np.array([[1, 1, 1, 1, 1, 1], [1, 1.5, 1, 1, 0.5, 2]], np.float32)
    found = weigh(embeds, weights, [2, 3])
    np.testing.assert_array_equal(found[0], embeds[0])
    for columns, own in ((slice(0, 2), weights[1, :3]), (slice(2, 5), weights[1, 3:])):
        part = embeds[1, :, columns]
        weighed = part * own[:, None]
        np.testing.assert_allclose(found[1, :, columns], weighed * (part.mean() / weighed.mean()), rtol=1e-5)


def test_weights_of_one_change_no_bit_even_where_the_mean_is_zero() -> None:
    embeds = np.array([[[1.0], [-1.0]]], np.float32)
    assert weigh(embeds, np.ones((1, 2), np.float32), [1]) is embeds
