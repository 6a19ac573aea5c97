"""Preprocessors over HTTP."""

import asyncio
import base64
import io
import json
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse
from google.protobuf.json_format import MessageToDict
from PIL import Image
from pydantic import Field

from imagemesh.v1 import image_pb2
from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh_gateway.http_body import ALLOWED, Picture, Strict, Text
from imagemesh_gateway.http_media import JSON, PNG, negotiated, require_json
from imagemesh_gateway.preprocess import PreprocessServicer
from imagemesh_runtime.limits import MAX_SIDE
from imagemesh_runtime.preprocessing import MIN_RESOLUTION
from imagemesh_runtime.tensors import from_proto

PATH: Final = "/v1/preprocess"
# What the fields of PreprocessBody may be, for errors to say.
PREPROCESS_ALLOWED: Final = {
    "preprocessor": ALLOWED["model"],
    "image": ALLOWED["image"],
    "parameters": "an object of numbers, strings, true and false by name",
    "resolution": f"0, or {MIN_RESOLUTION} to {MAX_SIDE}",
    "model": ALLOWED["model"],
}


class PreprocessBody(Strict):
    """A picture and what is to be made of it."""

    preprocessor: Text
    image: Picture
    parameters: dict[Text, bool | int | float | Text] = Field(default_factory=dict)
    resolution: int = Field(0, ge=0, le=MAX_SIDE, description="Pixels of the shorter side; 0: as it is.")
    model: Text = Field("", description="Where one is needed; empty is the first that there is.")

    def to_proto(self) -> pb.PreprocessRequest:
        """The same request for the service."""
        return pb.PreprocessRequest(
            preprocessor=self.preprocessor,
            image=image_pb2.Image(encoded=self.image),
            parameters={name: json.dumps(value) for name, value in self.parameters.items()},
            resolution=self.resolution,
            model=self.model,
        )


def add_preprocessors(app: FastAPI, servicer: PreprocessServicer) -> None:
    """``GET /v1/preprocessors`` and ``POST /v1/preprocess``."""

    @app.get("/v1/preprocessors")
    async def list_preprocessors() -> Response:
        """Tell the preprocessors that there are, with their parameters."""
        answer = await servicer.ListPreprocessors(pb.ListPreprocessorsRequest(), None)
        return JSONResponse({"preprocessors": [_told(info) for info in answer.preprocessors]})

    @app.post(
        PATH,
        dependencies=[Depends(require_json)],
        responses={200: {"content": {PNG: {}, JSON: {}}, "description": "The picture."}},
    )
    async def preprocess(body: PreprocessBody, media: Annotated[str, Depends(negotiated)]) -> Response:
        """Make of a picture what a ControlNet is to follow: JSON with it in base64, or a PNG."""
        answer = await servicer.Preprocess(body.to_proto(), None)
        png, width, height = await asyncio.to_thread(_png, answer)
        if media == PNG:
            return Response(png, media_type=PNG)
        made = {"preprocessor": answer.preprocessor, "model": answer.model, "backend": answer.backend}
        return JSONResponse({"png": base64.b64encode(png).decode(), "width": width, "height": height, **made})


def _png(answer: pb.PreprocessResponse) -> tuple[bytes, int, int]:
    """The picture as a file, its width and its height."""
    pixels = from_proto(answer.image, "image", dtypes=["uint8"], shape=(None, None, 3))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue(), pixels.shape[1], pixels.shape[0]


def _told(info: pb.PreprocessorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "about": info.about,
        "aliases": list(info.aliases),
        "parameters": [_parameter(parameter) for parameter in info.parameters],
        "needs_model": info.needs_model,
        "models": list(info.models),
    }


def _parameter(parameter: pb.PreprocessorParameter) -> dict[str, Any]:
    """Its fields, as far as it has them, with its default as a value."""
    told: dict[str, Any] = MessageToDict(parameter, preserving_proto_field_name=True)
    default = json.loads(told.pop("default_value"))
    return told | {"default": default}
