"""TLS from files that may change while a process runs: what is in them now counts for every new connection."""

import asyncio
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.errors import FailedPrecondition

log = logging.getLogger(__name__)

# The authorities that the system, or gRPC, trusts anyway.
SYSTEM: Final = "system"
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True)
class TlsFiles:
    """PEM files.

    Attributes:
        certificate: what one shows: a certificate, and those that lead up to its authority's.
        key: its private key.
        authority: certificates of the authorities whose certificates the other end may show, or ``SYSTEM``.
    """

    certificate: str = ""
    key: str = ""
    authority: str = ""

    def __bool__(self) -> bool:
        return bool(self.certificate or self.key or self.authority)


NO_TLS: Final = TlsFiles()


@dataclass(frozen=True)
class Loaded:
    """What was in the files; ``version`` counts how often they have changed."""

    certificate: bytes | None
    key: bytes | None
    authority: bytes | None
    version: int


class Certificates:
    """The contents of the files, looked at once a second at most; for any thread.

    Files that can't be read, or don't fit together, as while they are being replaced, change nothing: the contents
    before go on to count until they do.

    Raises:
        FailedPrecondition: that is how they are at the start.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._paths = [one for one in (files.certificate, files.key, files.authority) if one not in ("", SYSTEM)]
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._complained: Any = None
        self._looked = time.monotonic()
        self._loaded = self._load(0)

    def current(self) -> Loaded:
        """What counts now."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= _LOOK_SECONDS:
                self._looked = now
                self._refresh()
            return self._loaded

    def context(self) -> ssl.SSLContext:
        """For a server of Python's own, of the files as they are."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Whose certificate has been withdrawn must not come back on the strength of an earlier connection.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        try:
            context.load_cert_chain(self.files.certificate, self.files.key, _no_password)
            if self.files.authority:
                context.verify_mode = ssl.CERT_REQUIRED
                _trust(context, self.files.authority)
        except (OSError, ssl.SSLError) as error:
            raise _unfit(self.files, error) from error
        return context

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            self._loaded = self._load(self._loaded.version + 1)
        except FailedPrecondition as error:
            if stamp != self._complained:
                log.warning("the certificates of before go on to count: %s", error)
            self._complained = stamp
            return
        self._seen = stamp
        log.info("certificates were read anew: %s", ", ".join(self._paths))

    def _load(self, version: int) -> Loaded:
        files = self.files
        if bool(files.certificate) != bool(files.key):
            raise FailedPrecondition("tls_certificate and tls_key belong together: one of the two is not set")
        try:
            check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            if files.certificate:
                check.load_cert_chain(files.certificate, files.key, _no_password)
            if files.authority:
                _trust(check, files.authority)
            authority = None if files.authority in ("", SYSTEM) else Path(files.authority).read_bytes()
            if not files.certificate:
                return Loaded(None, None, authority, version)
            return Loaded(Path(files.certificate).read_bytes(), Path(files.key).read_bytes(), authority, version)
        except (OSError, ssl.SSLError) as error:
            raise _unfit(files, error) from error

    def _stamp(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(_stamp_of, self._paths))


def _no_password() -> str:
    """Of a key that is encrypted: nobody is there to be asked for it."""
    return ""


def _trust(context: ssl.SSLContext, authority: str) -> None:
    if authority == SYSTEM:
        context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
    else:
        context.load_verify_locations(authority)


def _stamp_of(path: str) -> tuple[int, ...]:
    try:
        told = os.stat(path)
    except OSError:
        return ()
    return told.st_ino, told.st_mtime_ns, told.st_size


def _unfit(files: TlsFiles, error: OSError) -> FailedPrecondition:
    """What is wrong with the files: ``ssl``'s errors name none of them, and are ``OSError``s."""
    named = ", ".join(filter(None, (files.certificate, files.key, files.authority)))
    why = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror or error
    return FailedPrecondition(f"TLS by {named}: {why}")


def server_certificates(config: ServerConfig) -> Certificates | None:
    """What a server shows and asks for; None: it knows no TLS.

    Raises:
        FailedPrecondition: the files are not there, or don't fit together; or callers are to show what anybody has.
    """
    files = TlsFiles(config.tls_certificate, config.tls_key, config.tls_client_authority)
    if files.authority == SYSTEM:  # gRPC's server has none of its own, and would ask callers for no certificate
        told = "a PEM file of the authorities whose certificates callers must show, or empty"
        raise FailedPrecondition(f"tls_client_authority must be {told}, got {SYSTEM!r}")
    if files.authority and not files.certificate:
        raise FailedPrecondition("tls_client_authority needs tls_certificate and tls_key: callers come by TLS then")
    return Certificates(files) if files else None


def peer_files(config: ServerConfig) -> TlsFiles:
    """What a service shows and asks for where it calls others."""
    return TlsFiles(config.tls_certificate, config.tls_key, config.tls_authority) if config.tls_authority else NO_TLS


def server_credentials(certificates: Certificates) -> Any:
    """Credentials of a gRPC server, which asks at each new connection what is in the files now."""
    loaded = certificates.current()
    told = [loaded.version]

    def configuration(one: Loaded) -> Any:
        return grpc.ssl_server_certificate_configuration([(one.key, one.certificate)], one.authority)

    def renewed() -> Any:
        now = certificates.current()
        if now.version == told[0]:
            return None
        told[0] = now.version
        return configuration(now)

    return grpc.dynamic_ssl_server_credentials(configuration(loaded), renewed, loaded.authority is not None)


def server_context(certificates: Certificates) -> ssl.SSLContext:
    """A context for a server of Python's own, which asks at each new connection what is in the files now."""
    first = certificates.context()
    current: tuple[int, ssl.SSLContext] = (certificates.current().version, first)

    def renew(connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        nonlocal current
        version = certificates.current().version
        if version != current[0]:
            try:
                current = version, certificates.context()
            except FailedPrecondition as error:  # they changed again meanwhile; the next connection tries again
                log.warning("the certificates of before go on to count: %s", error)
        if current[1] is not context:
            connection.context = current[1]

    first.sni_callback = renew
    return first


class RenewedChannel:
    """A channel as stubs see one: calls after a change of the files go over a new connection.

    Args:
        open: makes a channel with some credentials.
        linger_seconds: how long calls under way may go on over the connection before.
    """

    def __init__(self, certificates: Certificates, open: Callable[[Any], Any], linger_seconds: float) -> None:
        self._certificates = certificates
        self._open = open
        self._linger = linger_seconds
        self._closing: set[asyncio.Task[None]] = set()
        loaded = certificates.current()
        self._version, self._channel = loaded.version, open(_channel_credentials(loaded))

    def __getattr__(self, name: str) -> Any:
        if name in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return lambda *args, **options: _Method(self, name, args, options)
        return getattr(self.current(), name)

    def current(self) -> Any:
        """The channel to make a call over."""
        loaded = self._certificates.current()
        if loaded.version != self._version:
            before, self._channel = self._channel, self._open(_channel_credentials(loaded))
            self._version = loaded.version
            closing = asyncio.ensure_future(before.close(self._linger))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return self._channel

    async def close(self, grace: float | None = None) -> None:
        """Close it; calls under way end after ``grace``."""
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(self._channel.close(grace), *self._closing, return_exceptions=True)


class _Method:
    """A method of whatever channel is the current one."""

    def __init__(self, owner: RenewedChannel, kind: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._owner, self._kind, self._args, self._options = owner, kind, args, options
        self._method = args[0].encode()  # as gRPC's own have it
        self._channel: Any = None
        self._made: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        channel = self._owner.current()
        if channel is not self._channel:
            self._channel, self._made = channel, getattr(channel, self._kind)(*self._args, **self._options)
        return self._made(*args, **options)


def _channel_credentials(loaded: Loaded) -> Any:
    return grpc.ssl_channel_credentials(loaded.authority, loaded.key, loaded.certificate)
