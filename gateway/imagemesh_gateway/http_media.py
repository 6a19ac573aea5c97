"""What HTTP requests bring and want: media types, and a generation in them."""

import base64
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from google.protobuf.json_format import MessageToDict

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.accept import choose
from imagemesh_gateway.http_errors import RefusedRequest
from imagemesh_runtime.tensors import from_proto

JSON, PNG = "application/json", "image/png"


async def require_json(request: Request) -> None:
    """Raise RefusedRequest (415) unless the body is said to be JSON."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != JSON:
        raise RefusedRequest(415, "body", kind or "no Content-Type", f"JSON, with Content-Type: {JSON}")


async def negotiated(request: Request) -> str:
    """The media type to answer with; asked before the work is done.

    Raises:
        RefusedRequest: 406, the client takes neither.
    """
    accept = ",".join(request.headers.getlist("accept"))
    media = choose(accept, (JSON, PNG))
    if media is None:
        raise RefusedRequest(406, "Accept", accept, f"something that {JSON} or {PNG} satisfies")
    return media


def generation_answer(result: pb.GenerateResult, media: str) -> Response:
    """A generation's result: all of it as JSON, or its first picture.

    Raises:
        RefusedRequest: 406, a picture is wanted and none was kept.
    """
    headers = {"X-Imagemesh-Seed": str(result.images[0].seed)} if result.images else {}
    if media == PNG:
        if not result.images:
            raise RefusedRequest(406, "Accept", PNG, f"{JSON}: no picture was kept; {result.rejected[-1].reason}")
        return Response(result.images[0].png, media_type=PNG, headers=headers)
    parameters = MessageToDict(result.parameters, preserving_proto_field_name=True)
    images = [{"png": base64.b64encode(image.png).decode()} | seen_json(image) for image in result.images]
    return JSONResponse(
        {
            "id": result.id,
            "images": images,
            "parameters": parameters | {"seed": result.parameters.seed},
            "timings": [MessageToDict(one, preserving_proto_field_name=True) for one in result.timings],
        }
        | rejected_json(result),
        headers=headers,
    )


def seen_json(image: pb.GeneratedImage | pb.RejectedImage) -> dict[str, Any]:
    """A picture without its bytes: its seed and which of the request's it is, and what was asked to be seen of it."""
    told: dict[str, Any] = {"seed": image.seed, "index": image.index}
    if image.HasField("classification"):
        told["classification"] = [
            {"label": one.label, "probability": one.probability, "index": one.index, "logit": one.logit}
            for one in image.classification.predictions
        ]
    if isinstance(image, pb.GeneratedImage) and image.HasField("embedding"):
        told["embedding"] = from_proto(image.embedding, "embedding", dtypes=["float32"]).tolist()
    return told


def rejected_json(result: pb.GenerateResult) -> dict[str, Any]:
    """The pictures that were not kept, and why, where there are any."""
    rejected = [seen_json(one) | {"reason": one.reason} for one in result.rejected]
    return {"rejected": rejected} if rejected else {}
