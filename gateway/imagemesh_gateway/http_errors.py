"""Errors as the HTTP face tells them: ``{"error": {"code": ..., "message": ..., "field": ...}}``."""

import logging
import math
import secrets
from collections.abc import Callable, Mapping
from types import MappingProxyType

import grpc
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from google.rpc import error_details_pb2
from starlette.exceptions import HTTPException

from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import (
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    MeshError,
    Unauthenticated,
    http_status,
)

log = logging.getLogger(__name__)

_SHOWN = 80  # characters of a client's own field name that an error repeats
# Codes for the refusals of the framework itself, by status.
_CODES = {404: grpc.StatusCode.NOT_FOUND, 405: grpc.StatusCode.UNIMPLEMENTED}


class RefusedRequest(InvalidArgument):
    """What HTTP has a status of its own for: a body too large, a type that isn't spoken here."""

    def __init__(self, status: int, field: str, value: object, allowed: str) -> None:
        self.status = status
        super().__init__(field, value, allowed)


class FrameworkRefusal(MeshError):
    """What the framework itself refuses: a path or a method that isn't there."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.code = _CODES.get(status, grpc.StatusCode.UNKNOWN)
        super().__init__(message)


class Conflict(FailedPrecondition):
    """What is asked for does not go with the state that a thing is in now."""

    status = 409


def error_response(error: MeshError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer for an error of ours."""
    return JSONResponse(error_body(error), status_of(error), {**timing_of(error), **(headers or {})})


def status_of(error: MeshError) -> int:
    """The HTTP status that tells of the error."""
    return error.status if isinstance(error, RefusedRequest | FrameworkRefusal | Conflict) else http_status(error.code)


def timing_of(error: MeshError) -> dict[str, str]:
    """The header that says when to come back, if that may help."""
    retry_after = error.retry_after()
    return {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}


def challenge_of(error: MeshError) -> dict[str, str]:
    """The header that says how to show a key, if that is what is missing."""
    told = 'Bearer realm="imagemesh", Basic realm="imagemesh", charset="UTF-8"'
    return {"WWW-Authenticate": told} if isinstance(error, Unauthenticated) else {}


def field_of(error: MeshError) -> str | None:
    """The field that is at fault, if one is."""
    for detail in error.details():
        if isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
            return str(detail.field_violations[0].field)
    return None


def error_body(error: MeshError) -> dict[str, dict[str, str]]:
    """What is told of the error, as JSON."""
    return _body(error.code.name, str(error), field_of(error))


def add_error_handlers(
    app: FastAPI,
    tell: Callable[[MeshError, str], Response],
    allowed: Mapping[str, str],
    by_path: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    """Answer every failure in the shape that ``tell`` gives it at a path.

    ``allowed`` and ``by_path`` say what fields of bodies may be, and below a path with "?" the fields of queries.
    """

    async def on_mesh_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, MeshError)
        return error_response(error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        path = request.url.path if error.errors()[0]["loc"][0] == "body" else f"{request.url.path}?"
        return error_response(what_is_wrong(error, by_path.get(path, allowed)))

    app.add_exception_handler(MeshError, on_mesh_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)

    async def on_framework_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 400:  # the body was read, but could not be understood
            return tell(InvalidArgument("body", await request.body(), "JSON that can be parsed"), path)
        message = f"{request.method} {_printable(path)}: {error.detail}"
        response = tell(FrameworkRefusal(error.status_code, message), path)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(HTTPException, on_framework_error)
    app.add_exception_handler(Exception, _on_unforeseen)


def what_is_wrong(error: RequestValidationError, allowed: Mapping[str, str]) -> InvalidArgument:
    """The first thing that is, with what ``allowed`` says of the field."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return InvalidArgument("body", error.body, f"JSON ({first['ctx']['error']} at character {location[0]})")
    got = "nothing" if first["type"] == "missing" else _outline(first["input"])
    if not location:
        named = " whose field names are valid Unicode" if first["type"] == "string_unicode" else ""
        return InvalidArgument("body", got, f"a JSON object{named}")
    field = _printable(".".join(location))
    if first["type"] == "extra_forbidden":
        return InvalidArgument(
            field[:_SHOWN], got, f"left out (the fields are {', '.join(_beside(location, allowed))})"
        )
    return InvalidArgument(field, got, _longest(location, allowed) or first["msg"])


def _beside(location: list[str], allowed: Mapping[str, str]) -> list[str]:
    """The fields of the object in which the last one of the path stands."""
    path = [part for part in location[:-1] if not part.isdecimal()]
    inside = [name.split(".") for name in allowed]
    return [name[-1] for name in inside if name[:-1] == path]


def _longest(location: list[str], allowed: Mapping[str, str]) -> str | None:
    """What is said of the field, or else of the one that it is a part of."""
    path = [part for part in location if not part.isdecimal()]
    found = (allowed.get(".".join(path[:end])) for end in range(len(path), 0, -1))
    return next((said for said in found if said is not None), None)


def _outline(value: object) -> object:
    """The value if it is a plain one; of one that holds others only its size, since it may be huge or deep."""
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    return f"a list of {len(value)} values" if isinstance(value, list) else value


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    return error_response(unforeseen(error, request.url.path))


def unforeseen(error: Exception, path: str) -> InternalError:
    """Log the error under an id; the client gets only that."""
    error_id, trace_id = secrets.token_hex(8), current_call().trace.trace_id
    log.error("%r failed, error id %s, trace %s", path, error_id, trace_id, exc_info=error)
    return InternalError(error_id)


def _printable(text: str) -> str:
    """The text, with what can't be written as UTF-8 escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _body(code: str, message: str, field: str | None) -> dict[str, dict[str, str]]:
    body = {"code": code, "message": _printable(message)}
    if field is not None:
        body["field"] = field
    return {"error": body}
