"""What belongs to the call being served: its deadline, its trace, and what it cost. Follows the call through tasks."""

import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

# A client gives up when its own clock says so, a little before the deadline that it sent: gRPC rounds that one up.
_EARLY_SECONDS, _EARLY_SHARE = 0.05, 0.02
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)


@dataclass(frozen=True)
class Trace:
    """A W3C trace context (https://www.w3.org/TR/trace-context/)."""

    trace_id: str
    span_id: str
    flags: str = "01"

    @classmethod
    def start(cls) -> "Trace":
        """A trace that begins here."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def parse(cls, header: str | None) -> "Trace | None":
        """The caller's trace, or None if the header is absent or malformed (the standard says: begin anew).

        Versions after 00 may append fields of their own.
        """
        match = _TRACEPARENT.fullmatch(header or "")
        if match is None or (match[1] == "00" and match[5] is not None):
            return None
        if match[2] == "0" * 32 or match[3] == "0" * 16:
            return None
        return cls(match[2], match[3], match[4])

    def child(self) -> "Trace":
        """A span below this one."""
        return Trace(self.trace_id, secrets.token_hex(8), self.flags)

    @property
    def header(self) -> str:
        """The value of the ``traceparent`` header."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


@dataclass
class CallContext:
    """One call on its way through a service."""

    trace: Trace = field(default_factory=Trace.start)
    # On the clock of time.monotonic(); None: no limit.
    deadline: float | None = None
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    # Of the device's time, what was this call's own where it shared its forwards with others; 0: nobody counted.
    device_seconds: float = 0.0
    # On the same clock.
    begun: float = field(default_factory=time.monotonic)

    def remaining(self) -> float | None:
        """Seconds left, possibly negative; None: no limit."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def expired(self) -> bool:
        """Whether a call that was cancelled just now ended by its deadline; else its caller went.

        gRPC cancels the servicer for both, and says nothing of the reason. ``imagemesh_cancelled_requests_total``
        counts only those who went: ``if not current_call().expired(): metrics.cancelled.inc()``.
        """
        remaining = self.remaining()
        early = _EARLY_SECONDS + _EARLY_SHARE * (time.monotonic() - self.begun)
        return remaining is not None and remaining <= early

    @property
    def server_timing(self) -> str:
        """The cost as a ``Server-Timing`` header (https://www.w3.org/TR/server-timing/), in milliseconds."""
        device = f", device;dur={self.device_seconds * 1e3:.3f}" if self.device_seconds else ""
        return f"queue;dur={self.queue_seconds * 1e3:.3f}, compute;dur={self.compute_seconds * 1e3:.3f}{device}"


def parse_server_timing(header: str) -> dict[str, float]:
    """Durations in seconds by name."""
    pairs = re.findall(r"([\w-]+);dur=([0-9]+(?:\.[0-9]+)?)", header)
    return {name: float(milliseconds) / 1e3 for name, milliseconds in pairs}


_current: ContextVar[CallContext | None] = ContextVar("imagemesh_call", default=None)


def current_call() -> CallContext:
    """The call being served; outside of one, a fresh context without limits."""
    return _current.get() or CallContext()


def served_call() -> CallContext | None:
    """The call being served; None outside of one."""
    return _current.get()


def set_current_call(call: CallContext) -> None:
    """Make ``call`` the current one for this task and the tasks it starts."""
    _current.set(call)
