"""The one place where callers are let in, whatever they speak."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from prometheus_client import Counter

from imagemesh_gateway.access.caller import Caller, current_caller, set_current_caller
from imagemesh_gateway.access.keyring import Keyring
from imagemesh_gateway.access.rates import Rates
from imagemesh_gateway.access.rights import Right, right_of_method
from imagemesh_gateway.config import GatewayConfig
from imagemesh_runtime.addresses import is_local
from imagemesh_runtime.errors import FailedPrecondition, MeshError
from imagemesh_runtime.interceptors import Call, Layer
from imagemesh_runtime.metrics import Metrics

_CODES: Final = ("UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED")


class Door:
    """Knows callers by their keys, holds them to the rights and rates of these, and counts whom it turns away.

    Raises:
        FailedPrecondition: the file of keys can't be read; or there is none, and others than this machine could call.
    """

    def __init__(self, config: GatewayConfig, metrics: Metrics) -> None:
        require_keys(config)
        self._keyring = Keyring(Path(config.keys_file)) if config.keys_file else None
        self._rates = Rates()
        self._refused = Counter(
            "imagemesh_refused_calls", "Calls that were turned away at the door.", ("code",), registry=metrics.registry
        )
        for code in _CODES:
            self._refused.labels(code)

    def start(self) -> None:
        """Look after the file of keys."""
        if self._keyring is not None:
            self._keyring.start()

    async def stop(self) -> None:
        """Look after it no longer."""
        if self._keyring is not None:
            await self._keyring.stop()

    def enter(self, header: str | None, right: Right) -> None:
        """Let in who shows the header, for a call that needs the right; ``current_caller`` knows them from then on.

        Raises:
            Unauthenticated: no key, or one that isn't taken.
            PermissionDenied: the key's role has not the right.
            OverLimit: the key has been used too often.
        """
        if self._keyring is None or right is Right.OPEN:
            return
        try:
            caller: Caller = self._keyring.authenticate(header)
            caller.require(right)
            self._rates.take(caller)
        except MeshError as error:
            self._refused.labels(error.code.name).inc()
            raise
        set_current_caller(caller)

    def count_message(self) -> None:
        """Hold a message of a stream to the caller's rate, as a call.

        Raises:
            OverLimit: it is one too many for now.
        """
        try:
            self._rates.take(current_caller())
        except MeshError as error:
            self._refused.labels(error.code.name).inc()
            raise

    def layer(self) -> Layer:
        """What lets gRPC's callers in."""

        @asynccontextmanager
        async def layer(call: Call) -> AsyncIterator[None]:
            header = call.metadata.get("authorization")
            self.enter(header if isinstance(header, str) else None, right_of_method(call.service, call.method))
            yield

        return layer


def require_keys(config: GatewayConfig) -> None:
    """Raise FailedPrecondition if others than this machine could call without a key, and nobody said that they may."""
    if config.keys_file or config.allow_anyone:
        return
    for address in (config.listen, config.http_listen):
        if not is_local(address):
            raise FailedPrecondition(
                f"the gateway would take calls from anyone who reaches {address}: set keys_file (imagemesh keys create "
                "makes one), or allow_anyone if that is meant"
            )
