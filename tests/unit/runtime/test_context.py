"""Traces, deadlines and costs of calls, and the headers that carry them."""

import asyncio
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imagemesh_runtime.context import CallContext, Trace, current_call, parse_server_timing, set_current_call

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_good_header_comes_back_equal() -> None:
    assert Trace.parse(GOOD) == Trace(TRACE, SPAN, "01")
    assert Trace.parse(GOOD).header == GOOD


def test_a_later_version_may_append_fields() -> None:
    assert Trace.parse(f"cc-{TRACE}-{SPAN}-01-what-the-future-brings") == Trace(TRACE, SPAN, "01")


HOSTILE = {
    "absent": None,
    "empty": "",
    "upper case": GOOD.upper(),
    "trailing newline": GOOD + "\n",
    "trailing space": GOOD + " ",
    "version ff": "ff" + GOOD[2:],
    "version 00 with more fields": GOOD + "-more",
    "later version run on": "cc" + GOOD[2:] + "more",
    "zero trace": f"00-{'0' * 32}-{SPAN}-01",
    "zero span": f"00-{TRACE}-{'0' * 16}-01",
    "short": GOOD[:-1],
    "other digits": GOOD.replace("4", "٤"),
    "megabyte": "0" * 1_000_000,
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_malformed_header_begins_a_new_trace(header: str | None) -> None:
    assert Trace.parse(header) is None


@given(st.text())
@example(GOOD)
def test_no_header_breaks_the_parser(header: str) -> None:
    trace = Trace.parse(header)
    assert trace is None or re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", trace.header)


def test_a_child_has_its_parents_trace_and_its_own_span() -> None:
    parent = Trace.start()
    child = parent.child()
    assert (child.trace_id, child.flags) == (parent.trace_id, parent.flags)
    assert child.span_id != parent.span_id


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_server_timing_comes_back_to_the_microsecond(queue: float, compute: float) -> None:
    call = CallContext(queue_seconds=queue, compute_seconds=compute)
    assert parse_server_timing(call.server_timing) == pytest.approx({"queue": queue, "compute": compute}, abs=1e-6)


@given(st.one_of(st.text(), st.from_regex(r"\A([a-z]+;dur=[0-9.]*,? ?)*\Z")))
@example("a;dur=1.2.3")
@example("a;dur=.")
@example("a;dur=" + "9" * 5000)
def test_no_server_timing_breaks_the_parser(header: str) -> None:
    assert all(value >= 0 for value in parse_server_timing(header).values())


def test_outside_of_a_call_there_is_no_limit() -> None:
    assert current_call().remaining() is None


async def test_the_current_call_follows_into_tasks_and_not_back() -> None:
    outer = CallContext()
    set_current_call(outer)

    async def inner() -> CallContext:
        found = current_call()
        set_current_call(CallContext())
        return found

    assert await asyncio.create_task(inner()) is outer
    assert current_call() is outer


@pytest.mark.parametrize(
    ("left", "lasted", "expired"),
    [
        (None, 0.0, False),
        (60.0, 0.0, False),
        (-1.0, 0.0, True),
        (0.02, 0.0, True),  # the client's clock, which is a little early
        (0.5, 1.0, False),
        (0.5, 60.0, True),
    ],
)
def test_a_cancelled_call_tells_a_deadline_from_a_caller_who_went(
    left: float | None, lasted: float, expired: bool
) -> None:
    now = time.monotonic()
    call = CallContext(deadline=None if left is None else now + left, begun=now - lasted)
    assert call.expired() is expired
