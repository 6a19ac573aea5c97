"""Errors in the form of that API."""

from fastapi import Response
from fastapi.responses import JSONResponse

from imagemesh_gateway.http_errors import field_of, status_of, timing_of
from imagemesh_runtime.errors import InvalidArgument, MeshError


def sdapi_error(error: MeshError) -> Response:
    """``error`` (our code), ``detail`` and ``errors`` (what is wrong); 422 where a value is."""
    told = {"error": error.code.name, "detail": str(error), "body": "", "errors": str(error)}
    field = field_of(error)
    if field is not None:
        told["field"] = field
    status = status_of(error)
    return JSONResponse(told, 422 if status == 400 and isinstance(error, InvalidArgument) else status, timing_of(error))
