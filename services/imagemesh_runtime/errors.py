"""The errors of the mesh, each with its gRPC code; raised anywhere, mapped to ``google.rpc.Status`` in one place.

MeshError                  INTERNAL
├── InvalidArgument        INVALID_ARGUMENT      BadRequest: field, value, what is allowed
├── NotFound               NOT_FOUND             ResourceInfo: kind and name; the message lists what exists
├── AlreadyExists          ALREADY_EXISTS        ResourceInfo: kind and name
├── Overloaded             RESOURCE_EXHAUSTED    RetryInfo: when to come back
│   └── TooMuchAhead       RESOURCE_EXHAUSTED    RetryInfo: when to come back
├── OverLimit              RESOURCE_EXHAUSTED    RetryInfo: when to come back; QuotaFailure: what is used up
├── TooLarge               RESOURCE_EXHAUSTED
├── Unavailable            UNAVAILABLE           ErrorInfo: which service
│   ├── Hangs              UNAVAILABLE           ErrorInfo: which service, with a reason of its own
│   └── Deadly             UNAVAILABLE           ErrorInfo: likewise
├── DeadlineExceeded       DEADLINE_EXCEEDED     ErrorInfo: which service
├── FailedPrecondition     FAILED_PRECONDITION
├── Unauthenticated        UNAUTHENTICATED       ErrorInfo: what is wrong with the key
├── PermissionDenied       PERMISSION_DENIED
├── Unimplemented          UNIMPLEMENTED
├── NotFinite              INTERNAL              ErrorInfo: which model
├── InternalError          INTERNAL              ErrorInfo: an id whose story is in the log
└── RemoteError            as the peer said, its details handed on
"""

import difflib
from collections.abc import Iterable, Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "imagemesh"
_SHOWN = 80  # characters of a client's value that an error repeats
_LISTED = 1500  # characters of names that an error lists: gRPC drops a status of over 8 KiB, and it is in there twice


def shorten(value: object, limit: int = _SHOWN) -> str:
    """``repr`` of ``value``, cut so that a hostile value can't flood a log or an answer."""
    text = repr(value if not isinstance(value, str | bytes) else value[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names) or "none"
    if len(text) <= _LISTED:
        return text
    shown = text[:_LISTED].rpartition(", ")[0]
    return f"{shown} and {len(names) - shown.count(', ') - 1} more"


def _perhaps(name: str, names: Sequence[str]) -> str:
    """The name that was probably meant, if one is near."""
    folded = {one.casefold(): one for one in names}
    near = difflib.get_close_matches(name[:_SHOWN].casefold(), folded, n=1, cutoff=0.75)
    return f", perhaps {folded[near[0]]!r}" if near else ""


def _retry_info(seconds: float) -> Message:
    info: Message = error_details_pb2.RetryInfo(
        retry_delay=duration_pb2.Duration(nanos=int(seconds % 1 * 1e9), seconds=int(seconds))
    )
    return info


class MeshError(Exception):
    """The root. ``code`` is the gRPC status code of the class."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL

    def details(self) -> Sequence[Message]:
        """Messages for the ``details`` of ``google.rpc.Status``."""
        return ()

    def retry_after(self) -> float | None:
        """Seconds after which the same call may succeed; None: it won't."""
        return None

    def to_status(self) -> status_pb2.Status:
        """This error as gRPC's rich error model (https://google.aip.dev/193) has it."""
        status = status_pb2.Status(code=self.code.value[0], message=str(self))
        for detail in self.details():
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class InvalidArgument(MeshError):
    """A field of the request has a value that isn't allowed."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.description = f"must be {allowed}, got {shorten(value)}"
        super().__init__(f"{field} {self.description}")

    def details(self) -> Sequence[Message]:
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.description)
        return (error_details_pb2.BadRequest(field_violations=[violation]),)


class NotFound(MeshError):
    """The request names something that isn't there."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, kind: str, name: str, available: Iterable[str]) -> None:
        self.kind, self.name = kind, name
        names = sorted(available)
        super().__init__(f"{kind} {shorten(name)} not found{_perhaps(name, names)}; available: {_listed(names)}")

    def details(self) -> Sequence[Message]:
        return (error_details_pb2.ResourceInfo(resource_type=self.kind, resource_name=self.name[:_SHOWN]),)


class AlreadyExists(MeshError):
    """A name that the request gives to something new belongs to something else."""

    code = grpc.StatusCode.ALREADY_EXISTS

    def __init__(self, kind: str, name: str, owner: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"{kind} {shorten(name)} is taken by {owner}")

    def details(self) -> Sequence[Message]:
        return (error_details_pb2.ResourceInfo(resource_type=self.kind, resource_name=self.name[:_SHOWN]),)


class Overloaded(MeshError):
    """A queue is full; the call did no work and may be repeated after ``seconds``."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, queue: str, limit: int, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"queue {queue} is full ({limit} waiting); retry after {seconds:.1f} s")

    def details(self) -> Sequence[Message]:
        return (_retry_info(self.seconds),)

    def retry_after(self) -> float | None:
        return self.seconds


class TooMuchAhead(Overloaded):
    """The deadline would pass while the call waits; it did no work, and may be made again when less is ahead."""

    def __init__(self, service: str, ahead: float, own: float, remaining: float) -> None:
        self.seconds = max(ahead + own - remaining, 0.1)
        MeshError.__init__(
            self,
            f"{service}: about {ahead:.1f} s of work are ahead and this takes {own:.1f} s, but its deadline is in "
            f"{remaining:.1f} s; retry after {self.seconds:.1f} s",
        )


class OverLimit(MeshError):
    """What ``subject`` may have is used up for now; the call did no work and may be repeated after ``seconds``."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, subject: str, told: str, seconds: float) -> None:
        self.subject, self.told, self.seconds = subject, told, seconds
        super().__init__(f"{subject}: {told}; retry after {seconds:.1f} s")

    def details(self) -> Sequence[Message]:
        violation = error_details_pb2.QuotaFailure.Violation(subject=self.subject, description=self.told)
        return (_retry_info(self.seconds), error_details_pb2.QuotaFailure(violations=[violation]))

    def retry_after(self) -> float | None:
        return self.seconds


class TooLarge(MeshError):
    """A message is over the limit; repeating the call won't help."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class _AboutService(MeshError):
    def __init__(self, service: str, message: str) -> None:
        self.service = service
        super().__init__(f"{service}: {message}")

    def details(self) -> Sequence[Message]:
        info = error_details_pb2.ErrorInfo(reason=self.code.name, domain=DOMAIN, metadata={"service": self.service})
        return (info,)


class Unavailable(_AboutService):
    """A service can't be reached, or is going away."""

    code = grpc.StatusCode.UNAVAILABLE


class Hangs(Unavailable):
    """A service's device doesn't come back from this very call, which may be what it hangs on."""

    REASON = "HANGS"

    def __init__(self, service: str) -> None:
        super().__init__(service, "its device hangs at this call")

    def details(self) -> Sequence[Message]:
        info = error_details_pb2.ErrorInfo(reason=self.REASON, domain=DOMAIN, metadata={"service": self.service})
        return (info,)


class Deadly(Unavailable):
    """So many replicas broke down at one request that it must not be made again: it may be what they broke down of."""

    REASON = "DEADLY"

    def __init__(self, service: str, replicas: int) -> None:
        super().__init__(service, f"{replicas} replicas broke down at this request, and no other is tried")

    def details(self) -> Sequence[Message]:
        info = error_details_pb2.ErrorInfo(reason=self.REASON, domain=DOMAIN, metadata={"service": self.service})
        return (info,)


class DeadlineExceeded(_AboutService):
    """A service did not answer in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class FailedPrecondition(MeshError):
    """The request is well-formed, but this service can't do it as it is configured."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unauthenticated(MeshError):
    """Who asks shows no API key that is taken. ``reason`` is for programs: what is wrong with the one that came."""

    code = grpc.StatusCode.UNAUTHENTICATED

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    def details(self) -> Sequence[Message]:
        return (error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN),)


class PermissionDenied(MeshError):
    """Who asks may not have this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(MeshError):
    """The service has no such method."""

    code = grpc.StatusCode.UNIMPLEMENTED


class NotFinite(MeshError):
    """A model made NaN or infinity of input that was finite, as float16 does where numbers grow too large for it."""

    REASON = "NOT_FINITE"

    def __init__(self, model: str, what: str) -> None:
        self.model = model
        super().__init__(f"model {model} gave {what} that are not finite; another dtype may help, such as float32")

    def details(self) -> Sequence[Message]:
        return (error_details_pb2.ErrorInfo(reason=self.REASON, domain=DOMAIN, metadata={"model": self.model}),)


class InternalError(MeshError):
    """Something unforeseen. The client gets an id; the story stays in the log."""

    def __init__(self, error_id: str) -> None:
        self.error_id = error_id
        super().__init__(f"internal error {error_id}; the service's log has the details")

    def details(self) -> Sequence[Message]:
        return (error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"id": self.error_id}),)


class RemoteError(MeshError):
    """What a peer answered, handed on unchanged."""

    def __init__(self, status: status_pb2.Status) -> None:
        self.status = status
        self.code = CODES.get(status.code, grpc.StatusCode.UNKNOWN)
        super().__init__(status.message)

    def details(self) -> Sequence[Message]:
        """The peer's details, as far as their types are google.rpc's own."""
        found: list[Message] = []
        for detail in self.status.details:
            cls = getattr(error_details_pb2, detail.TypeName().removeprefix("google.rpc."), None)
            if cls is not None and detail.Unpack(message := cls()):
                found.append(message)
        return found

    def to_status(self) -> status_pb2.Status:
        return self.status

    def retry_after(self) -> float | None:
        for info in self.details():
            if isinstance(info, error_details_pb2.RetryInfo):
                return max(float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9), 0.0)
        return None


CODES = {code.value[0]: code for code in grpc.StatusCode}
_HTTP = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.FAILED_PRECONDITION: 400,
    code_pb2.OUT_OF_RANGE: 400,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.ABORTED: 409,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.CANCELLED: 499,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}


def http_status(code: grpc.StatusCode) -> int:
    """The HTTP status for a gRPC code, as google.rpc.Code documents it."""
    return _HTTP.get(code.value[0], 500)
