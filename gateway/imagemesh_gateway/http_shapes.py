"""Routes of imitated APIs tell of errors as those APIs do."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from imagemesh_gateway.http_errors import RefusedRequest, unforeseen, what_is_wrong
from imagemesh_runtime.errors import MeshError

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def shaped(tell: Callable[[MeshError], Response], allowed: Mapping[str, str]) -> type[APIRoute]:
    """A class of routes whose errors ``tell`` makes answers of; ``allowed`` says what fields may be."""

    class Shaped(APIRoute):
        """See ``shaped``."""

        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                try:
                    return await handle(request)
                except RequestValidationError as error:
                    return tell(what_is_wrong(error, allowed))
                except HTTPException as error:
                    return tell(RefusedRequest(error.status_code, "body", error.detail, "JSON or a form to be parsed"))
                except MeshError as error:
                    return tell(error)
                except Exception as error:
                    return tell(unforeseen(error, request.url.path))

            return handled

    return Shaped
