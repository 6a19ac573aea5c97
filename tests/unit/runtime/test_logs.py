"""Lines of the log that programs read."""

import json
import logging
import sys

import pytest

from imagemesh_runtime import logs
from imagemesh_runtime.context import CallContext, set_current_call
from imagemesh_runtime.errors import InvalidArgument


def line(message: str, *arguments: object, error: bool = False) -> dict[str, str]:
    record = logging.LogRecord(
        "imagemesh.x", logging.WARNING, "x.py", 1, message, arguments, sys.exc_info() if error else None
    )
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    found: dict[str, str] = json.loads(text)
    return found


async def test_a_line_is_an_object_that_names_the_trace_of_its_call() -> None:
    assert set(line("outside")) == {"time", "level", "logger", "message"}
    call = CallContext()
    set_current_call(call)
    told = line("%s is\nfull", "é")
    assert told["time"].endswith("Z")
    assert told | {"time": ""} == {
        "time": "", "level": "WARNING", "logger": "imagemesh.x", "message": "é is\nfull",
        "trace_id": call.trace.trace_id, "span_id": call.trace.span_id,
    }  # fmt: skip


def test_an_exception_is_told_with_where_it_came_from() -> None:
    try:
        raise ZeroDivisionError("no")
    except ZeroDivisionError:
        told = line("failed", error=True)
    assert told["error"] == "ZeroDivisionError: no"
    assert "test_logs.py" in told["stack"]


def test_another_format_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="IMAGEMESH_LOG_FORMAT must be text or json, got 'xml'"):
        logs.configure("INFO", "xml")
