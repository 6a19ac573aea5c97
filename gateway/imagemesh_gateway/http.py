"""The gateway's HTTP face: generate, scrape, probe."""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, ConfigDict, Field

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.pipeline import generate
from imagemesh_gateway.plan import make_plan
from imagemesh_runtime.context import CallContext, Trace, set_current_call
from imagemesh_runtime.errors import InvalidArgument, MeshError, http_status
from imagemesh_runtime.metrics import Metrics

T = TypeVar("T")


class GenerateBody(BaseModel):
    """What to generate; what is left out is the mesh's choice, and told in the answer."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    negative_prompt: str = ""
    seed: int | None = Field(None, ge=0, lt=2**63, description="Drawn if left out.")
    steps: int | None = Field(None, ge=0, lt=2**32)
    guidance: float | None = None
    width: int = Field(0, ge=0, lt=2**32, description="Pixels; 0 is the model's default.")
    height: int = Field(0, ge=0, lt=2**32, description="Pixels; 0 is the model's default.")
    scheduler: str = Field("", description="Such as 'Euler a' or 'DPM++ 2M Karras'; empty is the model's own.")
    model: str = ""

    def to_proto(self) -> pb.GenerateRequest:
        """The same request for the pipeline."""
        values = self.model_dump(exclude_none=True)
        if "guidance" in values:
            values["guidance_scale"] = values.pop("guidance")
        return pb.GenerateRequest(**values)


def create_app(mesh: Mesh, metrics: Metrics, ready: Callable[[], bool], timeout_seconds: float) -> FastAPI:
    """The application; ``timeout_seconds`` bounds a request."""
    app = FastAPI(title="imagemesh", summary="Images made and understood by a mesh of gRPC services")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        return Response("ready\n") if ready() else Response("not ready\n", 503)

    @app.get("/metrics", include_in_schema=False)
    async def scrape(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    @app.post(
        "/v1/generate",
        responses={200: {"content": {"image/png": {}, "application/json": {}}, "description": "The picture."}},
    )
    async def generate_picture(body: GenerateBody, request: Request) -> Response:
        """Make a picture: a PNG where the client accepts one, else JSON with the picture in base64."""
        _begin_call(request, timeout_seconds)
        result = await _while_connected(request, _generate(mesh, metrics, body.to_proto(), timeout_seconds))
        return _answer(result, request.headers.get("accept", "*/*"))

    app.add_exception_handler(MeshError, _on_mesh_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    return app


def _begin_call(request: Request, timeout_seconds: float) -> None:
    parent = Trace.parse(request.headers.get("traceparent"))
    trace = parent.child() if parent else Trace.start()
    set_current_call(CallContext(trace, time.monotonic() + timeout_seconds))


async def _generate(
    mesh: Mesh, metrics: Metrics, asked: pb.GenerateRequest, timeout_seconds: float
) -> pb.GenerateResult:
    plan = await make_plan(asked, mesh)
    async with aclosing(generate(mesh, plan, metrics)) as events:
        async for event in events:
            if event.WhichOneof("event") == "result":
                return event.result
    raise RuntimeError("the pipeline ended without a result")


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but give it up when the client goes."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(result: pb.GenerateResult, accept: str) -> Response:
    parameters = MessageToDict(result.parameters, preserving_proto_field_name=True)
    if "image/png" in accept or "image/*" in accept:
        return Response(
            result.images[0].png, media_type="image/png", headers={"X-Imagemesh-Seed": str(result.images[0].seed)}
        )
    return JSONResponse(
        {
            "id": result.id,
            "images": [{"png": base64.b64encode(image.png).decode(), "seed": image.seed} for image in result.images],
            "parameters": parameters | {"seed": result.parameters.seed},
            "timings": [MessageToDict(one, preserving_proto_field_name=True) for one in result.timings],
        }
    )


async def _on_mesh_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MeshError)
    retry_after = error.retry_after()
    headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
    body: dict[str, object] = {"code": error.code.name, "message": str(error)}
    for detail in error.details():
        if isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
            body["field"] = detail.field_violations[0].field
    return JSONResponse({"error": body}, http_status(error.code), headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    body = {"code": "INVALID_ARGUMENT", "message": f"{field}: {first['msg']}", "field": field}
    return JSONResponse({"error": body}, 400)


class BodyLimit:
    """ASGI middleware that refuses bodies over a limit, by their announced length or while they come in."""

    def __init__(self, app: Callable[..., Awaitable[None]], max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        received = 0

        async def bounded() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise InvalidArgument("body", f"over {self._max_bytes} bytes", f"at most {self._max_bytes} bytes")
            return message

        await self._app(scope, bounded, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        message = f"the body must be at most {self._max_bytes} bytes"
        response = JSONResponse({"error": {"code": "INVALID_ARGUMENT", "message": message, "field": "body"}}, 413)
        await response(scope, receive, send)
