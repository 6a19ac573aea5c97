"""Which API a path belongs to, where an error is told before any route is found."""

from fastapi import Response

from imagemesh_gateway.http_errors import error_response
from imagemesh_gateway.http_openai import openai_error
from imagemesh_gateway.sdapi.errors import sdapi_error
from imagemesh_runtime.errors import MeshError

SDAPI_PATHS = ("/sdapi/", "/controlnet/")
OPENAI_PATHS = ("/v1/images/", "/v1/models")


def tell(error: MeshError, path: str) -> Response:
    """The error in the form of the API at that path."""
    if path.startswith(SDAPI_PATHS):
        return sdapi_error(error)
    return openai_error(error) if path.startswith(OPENAI_PATHS) else error_response(error)
