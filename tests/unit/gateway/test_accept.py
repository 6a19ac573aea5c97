"""Which media type an Accept header asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemesh_gateway.accept import choose

JSON, PNG = "application/json", "image/png"


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("image/png", PNG),
        ("IMAGE/PNG", PNG),
        ("image/*", PNG),
        ("application/json", JSON),
        ("application/*", JSON),
        ("application/json; charset=utf-8", JSON),
        ("image/png;q=0.5, application/json;q=0.4", PNG),
        ("image/png;q=0.4, application/json;q=0.5", JSON),
        ("image/png ; Q=0.4,application/json ; q = 0.5", JSON),
        # The closest range gives a type its weight, whatever the wider ones say.
        ("image/png;q=0.1, image/*, application/json;q=0.2", JSON),
        ("image/png;q=0, */*", JSON),
        ("application/json;q=0, */*", PNG),
        # Among equals: the more specific, then the first named.
        ("*/*, image/*", PNG),
        ("image/*, application/json", JSON),
        ("image/png, application/json", PNG),
        ("application/json, image/png", JSON),
        # A browser's.
        ("text/html,application/xhtml+xml,image/avif,image/webp,*/*;q=0.8", JSON),
        # What can't be understood is passed over.
        ("image/png;q=high, application/json;q=0.1", JSON),
        ("image/png;q=nan, application/json;q=0.1", JSON),
        ("nonsense, image/png", PNG),
        ("text/html", None),
        ("text/html, image/png;q=0", None),
        ("*/*;q=0", None),
        ("*/png", None),
        ("nonsense", None),
    ],
)
def test_what_is_liked_best_is_chosen(header: str, chosen: str | None) -> None:
    assert choose(header, (JSON, PNG)) == chosen


@given(st.text(alphabet='abimge/pngjson*;q=0.15, "', max_size=60))
def test_no_header_breaks_it(header: str) -> None:
    assert choose(header, (JSON, PNG)) in (JSON, PNG, None)
