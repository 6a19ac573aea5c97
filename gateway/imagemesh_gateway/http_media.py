"""What HTTP requests bring and want: media types, and a generation in them."""

import base64

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from google.protobuf.json_format import MessageToDict

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.accept import choose
from imagemesh_gateway.http_errors import RefusedRequest

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
    """A generation's result: all of it as JSON, or its first picture."""
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
