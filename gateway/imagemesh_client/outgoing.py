"""The requests of a stream, made as the mesh gets through them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final

from google.protobuf.message import Message

from imagemesh_client.images import ImageInput

_END: Final = object()


class Outgoing:
    """A request a picture; where one can't be made the list ends, and ``check`` tells why."""

    def __init__(self, images: Iterable[ImageInput], request: Callable[[ImageInput], Message]) -> None:
        self._images = iter(images)
        self._request = request
        self._error: Exception | None = None

    async def requests(self) -> AsyncIterator[Message]:
        """The requests; they are read and encoded on a thread. gRPC would log, not raise, what this one raised."""
        while True:
            made = await asyncio.to_thread(self._next)
            if made is _END:
                return
            yield made

    def check(self) -> None:
        """Raise what ended the list early."""
        if self._error is not None:
            raise self._error

    def _next(self) -> Any:
        try:
            image = next(self._images, _END)
            return _END if image is _END else self._request(image)  # type: ignore[arg-type]
        except Exception as error:
            self._error = error
            return _END
