"""The process's log: lines for people, or an object of JSON a line that names the trace of the call being served."""

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Final

from imagemesh_runtime.context import served_call
from imagemesh_runtime.errors import InvalidArgument

FORMATS: Final = ("text", "json")
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``; of a call ``trace_id`` and ``span_id``; of an
    exception ``error`` and ``stack``.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (call := served_call()) is not None:
            line |= {"trace_id": call.trace.trace_id, "span_id": call.trace.span_id}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line |= {"error": f"{type(error).__name__}: {error}", "stack": "".join(traceback.format_exception(error))}
        return json.dumps(line, ensure_ascii=False)


def configure(level: str, form: str) -> None:
    """Write to stderr from this level on, in one of ``FORMATS``.

    Raises:
        InvalidArgument: there is no such format.
    """
    if form not in FORMATS:
        raise InvalidArgument("IMAGEMESH_LOG_FORMAT", form, " or ".join(FORMATS))
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level, handlers=[handler])
