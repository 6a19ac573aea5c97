"""OpenTelemetry's spans, one for each call at both of its ends, where the process is told to make them.

Off, which is the default, nothing of OpenTelemetry's SDK is imported, and calls carry their trace context all the
same. On, the context has the span's ids, so that logs, spans and whoever continues the trace agree. Services of one
process have a resource each, and share the way out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from imagemesh_runtime.context import Trace
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, MeshError

SETTING: Final = "IMAGEMESH_TRACES"
CHOICES: Final = ("none", "otlp")
# Services whose calls nobody wants to see: probes, and questions that are asked all the time.
UNSEEN: Final = ("grpc.", "imagemesh.v1.LoadService", "imagemesh.v1.TransportService")

# Takes the spans of all services of this process; None: they are not made. Set once, before servers are created.
_way_out: Any = None


def configure(env: Mapping[str, str]) -> None:
    """Read ``IMAGEMESH_TRACES``; where to is up to OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT``...).

    Raises:
        InvalidArgument: there is no such choice.
        FailedPrecondition: OpenTelemetry is not installed.
    """
    choice = env.get(SETTING, "none")
    if choice not in CHOICES:
        raise InvalidArgument(SETTING, choice, " or ".join(CHOICES))
    if choice == "none":
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        told = f"{SETTING} is {choice}, and the package {error.name} is not here: pip install 'imagemesh[otel]'"
        raise FailedPrecondition(told) from error
    use(BatchSpanProcessor(OTLPSpanExporter()))


def use(way_out: Any) -> None:
    """Give the spans of services created from now on to this SpanProcessor; None: make none."""
    global _way_out
    _way_out = way_out


def spans_of(service: str) -> "Spans | None":
    """What makes a service's spans; None: nobody wants them."""
    return None if _way_out is None else Spans(service, _way_out)


class Spans:
    """Makes the spans of one service."""

    def __init__(self, service: str, way_out: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        self._api = trace
        provider = TracerProvider(resource=Resource.create({"service.name": service, "service.namespace": "imagemesh"}))
        provider.add_span_processor(way_out)
        self._tracer = provider.get_tracer("imagemesh")

    @contextmanager
    def span(
        self, name: str, kind: str, parent: Trace | None, attributes: Mapping[str, str | int | float]
    ) -> Iterator["Span"]:
        """A span around the block, ``kind`` being "server", "client" or "internal".

        One whose caller's trace is not sampled is not recorded either. An exception that leaves the block fails it.
        """
        made = self._tracer.start_span(
            name, self._context(parent), self._api.SpanKind[kind.upper()], dict(attributes),
            record_exception=False, set_status_on_exception=False,
        )  # fmt: skip
        span = Span(made, self._api.StatusCode.ERROR)
        try:
            yield span
        except BaseException as error:
            span.fail(error.code.name if isinstance(error, MeshError) else type(error).__name__)
            raise
        finally:
            made.end()

    def _context(self, parent: Trace | None) -> Any:
        if parent is None:
            return self._api.set_span_in_context(self._api.INVALID_SPAN)
        told = self._api.SpanContext(
            int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True,
            trace_flags=self._api.TraceFlags(int(parent.flags, 16)),
        )  # fmt: skip
        return self._api.set_span_in_context(self._api.NonRecordingSpan(told))


class Span:
    """One that is under way."""

    def __init__(self, made: Any, failed: Any) -> None:
        self._made = made
        self._failed = failed
        self._is_failed = False

    @property
    def trace(self) -> Trace:
        """Its place in the trace, to be handed on."""
        told = self._made.get_span_context()
        return Trace(f"{told.trace_id:032x}", f"{told.span_id:016x}", f"{int(told.trace_flags):02x}")

    def note(self, attributes: Mapping[str, str | int | float]) -> None:
        """What is known only later."""
        self._made.set_attributes(dict(attributes))

    def fail(self, told: str) -> None:
        """It failed; what is told first counts."""
        if not self._is_failed:
            self._is_failed = True
            self._made.set_status(self._failed, told)
