"""What a picture says of how it was made is read whole, and what it says to harm is read in no time."""

import time

import pytest

from imagemesh_gateway.sdapi.infotext import read_infotext, request_fields


def test_all_fields_of_a_line_are_read() -> None:
    line = 'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 1, Size: 64x48, Note: "a, b: \\"c\\"", Model: tiny-sd'
    told = read_infotext(f"a fox,\na hen\nNegative prompt: blur\n{line}")
    assert (told["Prompt"], told["Negative prompt"]) == ("a fox,\na hen", "blur")
    assert (told["Sampler"], told["Note"], told["Model"]) == ("DPM++ 2M", 'a, b: "c"', "tiny-sd")
    fields = request_fields(told)
    assert (fields["steps"], fields["cfg_scale"], fields["width"], fields["height"]) == (20, 7.5, 64, 48)


def test_what_is_no_field_is_passed_over() -> None:
    told = read_infotext("x\nSteps: 20, (what), : , Seed: 1, CFG scale: 7")
    assert {name: told[name] for name in ("Steps", "Seed", "CFG scale")} == {
        "Steps": "20",
        "Seed": "1",
        "CFG scale": "7",
    }


@pytest.mark.parametrize(
    "text",
    ["a" + " " * 99_990 + "b", "a" * 100_000, "a:" * 50_000, 'a:"' * 30_000, "a: " * 30_000, ", " * 50_000],
    ids=["blanks", "name", "colons", "quotes", "values", "commas"],
)
def test_no_text_keeps_the_reader_long(text: str) -> None:
    begun = time.process_time()
    read_infotext(text)
    assert time.process_time() - begun < 1


def test_of_a_long_line_no_value_is_torn() -> None:
    told = read_infotext("x\nSteps: 20, Seed: 1, CFG scale: 7, " + "Note: b, " * 900 + "Model: " + "m" * 9000)
    assert (told["Seed"], told["Note"], "Model" in told) == ("1", "b", False)


def test_a_size_of_too_many_digits_is_none() -> None:
    told = read_infotext(f"x\nSteps: 20, Seed: 1, Size: {'9' * 5000}x64, Hires resize: 64x{'9' * 5000}")
    assert {"width", "height", "hr_resize_x"}.isdisjoint(request_fields(told))
