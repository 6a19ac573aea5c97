"""OpenAI's image calls: ``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``."""

import asyncio
import base64
import io
import time
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import ValidationError

from imagemesh.v1 import gateway_service_pb2, job_service_pb2
from imagemesh_gateway.http_errors import field_of, status_of, timing_of
from imagemesh_gateway.http_jobs import result_of
from imagemesh_gateway.http_media import require_json
from imagemesh_gateway.http_models import model_json, models_json
from imagemesh_gateway.http_openai_body import OPENAI_ALLOWED, OpenAIBody, read_form
from imagemesh_gateway.http_shapes import shaped
from imagemesh_gateway.jobs.awaited import await_job, create_awaited
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.errors import MeshError, NotFound

# OpenAI's words for our fields, and its types for statuses.
_PARAMS: Final = {"width": "size", "height": "size", "num_images": "n", "guidance_scale": "guidance"}
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_FILES, _MAX_FIELDS = 20, 100


def add_openai(app: FastAPI, mesh: Mesh, jobs: Jobs) -> None:
    """All three, and a model alone."""
    router = APIRouter(route_class=shaped(openai_error, OPENAI_ALLOWED))

    @router.post("/v1/images/generations", dependencies=[Depends(require_json)])
    async def create_images(request: Request, body: OpenAIBody) -> Response:
        """Make pictures, as OpenAI's call does."""
        return await _pictures(request, jobs, body, body.to_create())

    @router.post("/v1/images/edits", openapi_extra=_edit_form())
    async def edit_image(request: Request) -> Response:
        """Change a picture, as OpenAI's call does: a form with the files ``image`` and ``mask``."""
        async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS) as form:
            fields, image, mask = await read_form(form)
        try:
            body = OpenAIBody.model_validate(fields)
        except ValidationError as error:
            located = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            raise RequestValidationError(located) from error
        return await _pictures(request, jobs, body, body.to_create(image, mask))

    @router.get("/v1/models")
    async def list_models() -> Response:
        """List the models, with all that is known of their parts."""
        return JSONResponse(await models_json(mesh))

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Response:
        """Tell of one model."""
        return JSONResponse(await model_json(mesh, model))

    app.include_router(router)


def _edit_form() -> dict[str, Any]:
    """The form for the OpenAPI document, which can't be read off the function."""
    file = {"type": "string", "format": "binary"}
    fields = {"image": file, "mask": file, **OpenAIBody.model_json_schema()["properties"]}
    schema = {"type": "object", "required": ["image", "prompt"], "properties": fields, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def openai_error(error: MeshError) -> Response:
    """The error in OpenAI's form."""
    status, field = status_of(error), field_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = "model_not_found" if isinstance(error, NotFound) and error.kind == "model" else error.code.name.lower()
    param = "model" if code == "model_not_found" else _PARAMS.get(field or "", field)
    told = {"message": str(error), "type": kind, "param": param, "code": code}
    return JSONResponse({"error": told}, status, timing_of(error))


async def _pictures(
    request: Request, jobs: Jobs, body: OpenAIBody, asked: job_service_pb2.CreateJobRequest
) -> Response:
    job = await create_awaited(jobs, asked)
    result = result_of(await await_job(jobs, job.id))
    told: dict[str, Any] = {"created": int(time.time()), "output_format": body.output_format or "png"}
    told["size"] = f"{result.parameters.width}x{result.parameters.height}"
    if body.response_format == "url":
        base = f"{str(request.base_url).rstrip('/')}/v1/jobs/{job.id}/images"
        data = [{"url": f"{base}/{i}", "seed": image.seed} for i, image in enumerate(result.images)]
    else:
        data = await asyncio.to_thread(_in_base64, result, body)
    return JSONResponse(told | {"data": data})


def _in_base64(result: gateway_service_pb2.GenerateResult, body: OpenAIBody) -> list[dict[str, Any]]:
    files = [_converted(image.png, body) for image in result.images]
    seeds = [image.seed for image in result.images]
    return [
        {"b64_json": base64.b64encode(file).decode(), "seed": seed} for file, seed in zip(files, seeds, strict=True)
    ]


def _converted(png: bytes, body: OpenAIBody) -> bytes:
    if body.output_format in (None, "png"):
        return png
    quality = 100 if body.output_compression is None else body.output_compression
    file = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.save(file, format=str(body.output_format), quality=quality)
    return file.getvalue()
