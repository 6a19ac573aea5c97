"""Prometheus metrics: one registry a service instance, so that several services can live in one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from imagemesh_runtime.tracing import spans_of

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
PATHS = ("shm", "raw", "protobuf")
DIRECTIONS = ("sent", "received")
_GRPC = ("grpc_type", "grpc_service", "grpc_method")


class Metrics:
    """The metrics of one service, and what makes its spans.

    Every ``imagemesh_*`` series carries the label ``service``.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        # None: the process makes none.
        self.spans = spans_of(service)
        self.registry = CollectorRegistry()
        self.grpc_started = self._grpc_counter("grpc_server_started", "RPCs started.")
        self.grpc_handled = self._grpc_counter("grpc_server_handled", "RPCs completed, whatever the code.", "grpc_code")
        self.grpc_received = self._grpc_counter("grpc_server_msg_received", "Messages received.")
        self.grpc_sent = self._grpc_counter("grpc_server_msg_sent", "Messages sent.")
        self.grpc_seconds = Histogram(
            "grpc_server_handling_seconds", "Seconds from start to end of an RPC.", _GRPC, buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.queue_wait = self._histogram("imagemesh_queue_wait_seconds", "Seconds a request waited for the device.")
        self.stage = self._histogram("imagemesh_stage_seconds", "Seconds of one stage of the work.", "stage")
        self.step = self._histogram("imagemesh_step_seconds", "Seconds of one forward of the model.")
        self.batch_size = self._histogram("imagemesh_batch_size", "Rows computed together.", buckets=_BATCHES)
        self.model_load = self._histogram("imagemesh_model_load_seconds", "Seconds to load a model.", "model")
        self.pending = self._gauge("imagemesh_pending_requests", "Requests waiting for the device.")
        self.running = self._gauge("imagemesh_running_requests", "Requests in work.")
        # A series a queue, made by whoever owns it.
        self.backlog = Gauge(
            "imagemesh_backlog_seconds", "Seconds until what is here would be done if nothing more came.", ("queue",),
            registry=self.registry,
        )  # fmt: skip
        self.cancelled = Counter(
            "imagemesh_cancelled_requests", "Requests given up because the caller went.", ("service",),
            registry=self.registry,
        ).labels(service)  # fmt: skip
        self._transport = Counter(
            "imagemesh_transport_bytes", "Bytes of messages that can hold tensors, by the way that they went.",
            ("service", "path", "direction"), registry=self.registry,
        )  # fmt: skip
        for path in PATHS:
            for direction in DIRECTIONS:
                self._transport.labels(service, path, direction)  # there, at 0, before anything moved
        self._add_control()
        self._add_routing()

    def _add_routing(self) -> None:
        self.passed_over = Counter(
            "imagemesh_passed_over", "Times that a replica was passed over for a while, since it was away or broken.",
            ("service", "peer"), registry=self.registry,
        )  # fmt: skip
        self.moved = Counter(
            "imagemesh_moved_generations", "Generations that went on at another replica.", ("service",),
            registry=self.registry,
        ).labels(self.service)  # fmt: skip

    def _add_control(self) -> None:
        self.control_stall = self._histogram(
            "imagemesh_control_stall_seconds",
            "Seconds that an evaluation waited for residuals: before it could begin, or within the forward.", "where",
        )  # fmt: skip
        self.control_bytes = Counter(
            "imagemesh_control_bytes", "Bytes of residuals that came from ControlNets.", ("service",),
            registry=self.registry,
        ).labels(self.service)  # fmt: skip

    def load(self) -> "Load":
        """What is here now."""
        requests = int(_sum(self.pending) + _sum(self.running))
        backlogs = [sample.value for family in self.backlog.collect() for sample in family.samples]
        # An engine that has measured nothing yet says 0.
        known = backlogs and (sum(backlogs) > 0 or not requests)
        return Load(requests, sum(backlogs) if known else None)

    def count_transport(self, path: str, direction: str, count: int) -> None:
        """Count bytes that were ``sent`` or ``received`` as plain ``protobuf``, ``raw`` or in ``shm``."""
        self._transport.labels(self.service, path, direction).inc(count)

    def _grpc_counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*_GRPC, *labels), registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("service",), registry=self.registry).labels(self.service)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> "Timings":
        return Timings(
            Histogram(name, text, ("service", *labels), buckets=buckets, registry=self.registry), self.service
        )


@dataclass(frozen=True)
class Load:
    """Requests that wait or are in work, and the seconds that they will take; None: not known."""

    requests: int
    backlog_seconds: float | None


def _sum(gauge: Gauge) -> float:
    return sum(sample.value for family in gauge.collect() for sample in family.samples)


class Timings:
    """A histogram whose first label, the service, is filled in."""

    def __init__(self, histogram: Histogram, service: str) -> None:
        self._histogram = histogram
        self._service = service
        if len(histogram._labelnames) == 1:
            histogram.labels(service)  # the series is there, at 0, before anything was measured

    def observe(self, value: float, *labels: str) -> None:
        """Record ``value`` under the remaining labels."""
        self._histogram.labels(self._service, *labels).observe(value)

    @contextmanager
    def time(self, *labels: str) -> Iterator[None]:
        """Record the seconds that the block takes."""
        start = perf_counter()
        try:
            yield
        finally:
            self.observe(perf_counter() - start, *labels)
