"""The gateway's HTTP face: generate, scrape, probe."""

import base64
from collections.abc import Callable
from contextlib import aclosing
from typing import Annotated, Final

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from google.protobuf.json_format import MessageToDict
from prometheus_client.exposition import choose_encoder
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.accept import choose
from imagemesh_gateway.http_errors import RefusedRequest, add_error_handlers
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.pipeline import generate
from imagemesh_gateway.plan import make_plan
from imagemesh_runtime.limits import MAX_GUIDANCE, MAX_SEED, MAX_SIDE, MAX_STEPS
from imagemesh_runtime.metrics import Metrics

JSON, PNG = "application/json", "image/png"


def _valid(text: str) -> str:
    text.encode()  # UnicodeEncodeError, which is a ValueError: JSON can spell half of a surrogate pair
    return text


Text = Annotated[str, AfterValidator(_valid)]

# What the fields of GenerateBody may be, for errors to say.
_TEXT = "a string of valid Unicode"
_SIDE = f"a whole number of pixels up to {MAX_SIDE}, or 0 for the model's default"
ALLOWED: Final = {
    "prompt": _TEXT,
    "negative_prompt": _TEXT,
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "steps": f"1 to {MAX_STEPS}",
    "guidance": f"0 to {MAX_GUIDANCE}",
    "width": _SIDE,
    "height": _SIDE,
    "scheduler": _TEXT,
    "model": _TEXT,
}


class GenerateBody(BaseModel):
    """What to generate; what is left out is the mesh's choice, and told in the answer."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    negative_prompt: Text = ""
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Drawn if left out.")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    width: int = Field(0, ge=0, le=MAX_SIDE, description="Pixels; 0 is the model's default.")
    height: int = Field(0, ge=0, le=MAX_SIDE, description="Pixels; 0 is the model's default.")
    scheduler: Text = Field("", description="Such as 'Euler a' or 'DPM++ 2M Karras'; empty is the model's own.")
    model: Text = ""

    def to_proto(self) -> pb.GenerateRequest:
        """The same request for the pipeline."""
        values = self.model_dump(exclude_none=True)
        if "guidance" in values:
            values["guidance_scale"] = values.pop("guidance")
        return pb.GenerateRequest(**values)


def create_app(mesh: Mesh, metrics: Metrics, ready: Callable[[], bool]) -> FastAPI:
    """The application; bounds and the call's context are up to ``http_guard``."""
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
        dependencies=[Depends(_require_json)],
        responses={200: {"content": {PNG: {}, JSON: {}}, "description": "The picture."}},
    )
    async def generate_picture(body: GenerateBody, media: Annotated[str, Depends(_negotiated)]) -> Response:
        """Make a picture: JSON with the picture in base64, or a PNG where the client likes that better."""
        return _answer(await _generate(mesh, metrics, body.to_proto()), media)

    add_error_handlers(app, ALLOWED)
    return app


async def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != JSON:
        raise RefusedRequest(415, "body", kind or "no Content-Type", f"JSON, with Content-Type: {JSON}")


async def _negotiated(request: Request) -> str:
    """The media type to answer with; asked before the work is done."""
    accept = ",".join(request.headers.getlist("accept"))
    media = choose(accept, (JSON, PNG))
    if media is None:
        raise RefusedRequest(406, "Accept", accept, f"something that {JSON} or {PNG} satisfies")
    return media


async def _generate(mesh: Mesh, metrics: Metrics, asked: pb.GenerateRequest) -> pb.GenerateResult:
    plan = await make_plan(asked, mesh)
    async with aclosing(generate(mesh, plan, metrics)) as events:
        async for event in events:
            if event.WhichOneof("event") == "result":
                return event.result
    raise RuntimeError("the pipeline ended without a result")


def _answer(result: pb.GenerateResult, media: str) -> Response:
    first = result.images[0]
    if media == PNG:
        return Response(first.png, media_type=PNG, headers={"X-Imagemesh-Seed": str(first.seed)})
    parameters = MessageToDict(result.parameters, preserving_proto_field_name=True)
    return JSONResponse(
        {
            "id": result.id,
            "images": [{"png": base64.b64encode(image.png).decode(), "seed": image.seed} for image in result.images],
            "parameters": parameters | {"seed": result.parameters.seed},
            "timings": [MessageToDict(one, preserving_proto_field_name=True) for one in result.timings],
        },
        headers={"X-Imagemesh-Seed": str(first.seed)},
    )
