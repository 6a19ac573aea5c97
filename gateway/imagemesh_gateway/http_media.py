"""What HTTP requests bring and want: media types."""

from fastapi import Request

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
