"""What pages of other sites may not do with a browser's user's hands."""

from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from imagemesh_runtime.errors import PermissionDenied

# Methods that change nothing.
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


def check_origin(headers: Headers, may_not: str) -> None:
    """A page of another site may not; browsers tell whose page it is, and what is no browser tells of none.

    Sockets know no same-origin policy, and forms and calls without a body are sent without asking first.

    Raises:
        PermissionDenied: it is such a page's.
    """
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None and _netloc(origin) != host.lower():
        raise PermissionDenied(f"a page of {origin[:80]!r} may not {may_not} at {host[:80]!r}")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # a bracket of no address
        return ""
