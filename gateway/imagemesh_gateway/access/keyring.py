"""The keys that are taken now: read from their file, and read again when that changes."""

import asyncio
import base64
import binascii
import hmac
import logging
import os
from pathlib import Path
from typing import Final

from imagemesh_gateway.access.caller import Caller
from imagemesh_gateway.access.keys import digest_of, id_of, read_keys
from imagemesh_runtime.errors import MeshError, Unauthenticated

log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0
_NO_DIGEST: Final = "0" * 64
_HOW: Final = "send an API key as Authorization: Bearer KEY, or as the password of HTTP Basic"


class Keyring:
    """Knows callers by the header ``Authorization``, as of gRPC's metadata or of HTTP.

    A file that can't be read any more, or is broken, changes nothing: the keys that were in it are taken on.

    Raises:
        FailedPrecondition: the file can't be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._complained: tuple[int, ...] | None = None
        self._keys = read_keys(path)
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look after the file from now on."""
        self._watch = asyncio.create_task(self._follow(), name="keys")

    async def stop(self) -> None:
        """Look after it no longer."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    def refresh(self) -> None:
        """Read the file again if it is another one than was read last; what fails is tried again."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            self._keys = read_keys(self._path)
        except MeshError as error:
            if stamp != self._complained:
                log.error("the keys that were known before are taken on: %s", error)
            self._complained = stamp
            return
        self._seen, self._complained = stamp, None
        log.info("%d keys were read from %s", len(self._keys), self._path)

    def authenticate(self, header: str | None) -> Caller:
        """Who shows that header.

        Raises:
            Unauthenticated: there is no key in it, or one that isn't taken (any more). What is wrong with a key is only
                told to who has it.
        """
        token = _token_in(header)
        key = self._keys.get(id_of(token) or "")
        # Of a key that isn't known as much is compared as of one that is.
        if not hmac.compare_digest(digest_of(token), _NO_DIGEST if key is None else key.sha256) or key is None:
            raise Unauthenticated("API_KEY_INVALID", f"this API key is not known; {_HOW}")
        if key.revoked is not None:
            raise Unauthenticated("API_KEY_REVOKED", f"API key {key.id} was revoked at {key.revoked.isoformat()}")
        if key.expires is not None and key.state == "expired":
            raise Unauthenticated("API_KEY_EXPIRED", f"API key {key.id} expired at {key.expires.isoformat()}")
        return Caller(key)

    def _stamp(self) -> tuple[int, ...]:
        try:
            told = os.stat(self._path)
        except OSError:
            return ()
        return told.st_ino, told.st_mtime_ns, told.st_size

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.to_thread(self.refresh)


def _token_in(header: str | None) -> str:
    """The key in an ``Authorization`` header.

    Raises:
        Unauthenticated: there is none.
    """
    scheme, _, rest = (header or "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            user, _, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            raise Unauthenticated("API_KEY_INVALID", f"HTTP Basic that can't be read; {_HOW}") from None
        return password or user
    if scheme:
        raise Unauthenticated("API_KEY_INVALID", f"another scheme than Bearer and Basic; {_HOW}")
    raise Unauthenticated("CREDENTIALS_MISSING", f"an API key is needed; {_HOW}")
