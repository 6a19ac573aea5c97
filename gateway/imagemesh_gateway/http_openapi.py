"""The OpenAPI document: what FastAPI can't know of refusals and keys is said here."""

from typing import Any, Final

from fastapi import FastAPI

from imagemesh_gateway.http_faces import OPENAI_PATHS, SDAPI_PATHS

_METHODS: Final = frozenset({"get", "put", "post", "delete", "patch"})
_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where the gateway asks for one."},
    "basic": {"type": "http", "scheme": "basic", "description": "The same as the password of any user."},
}


def _object(required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | optional}


_TEXT: Final = {"type": "string"}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}
# By the form in which an API tells of errors.
_ERRORS: Final = {
    "Error": _object({"error": _object({"code": _TEXT, "message": _TEXT}, {"field": _TEXT})}, {}),
    "OpenAIError": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL}, {})}, {}
    ),
    "SdapiError": _object({"error": _TEXT, "detail": _TEXT, "body": _TEXT, "errors": _TEXT}, {"field": _TEXT}),
}


def describe(app: FastAPI) -> None:
    """Complete the application's document, once it is asked for."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(build())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    parts = document.setdefault("components", {})
    parts["securitySchemes"] = _SCHEMES
    schemas = parts.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # the framework's own form, in which nothing is told
        schemas.pop(name, None)
    schemas |= _ERRORS
    for path, operations in document["paths"].items():
        for method in _METHODS & set(operations):
            responses = operations[method]["responses"]
            responses.pop("422", None)
            responses["default"] = _refusal(path)
    # With a key, or without one where none is asked for.
    return document | {"security": [{}, *({name: []} for name in _SCHEMES)]}


def _refusal(path: str) -> dict[str, Any]:
    name = "SdapiError" if path.startswith(SDAPI_PATHS) else "OpenAIError" if path.startswith(OPENAI_PATHS) else "Error"
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": "A refusal or a failure.", "content": {"application/json": {"schema": schema}}}
