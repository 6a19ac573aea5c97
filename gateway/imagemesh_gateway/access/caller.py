"""Who asks. Follows a call through the gateway's tasks, as its deadline does."""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from imagemesh.v1 import priority_pb2
from imagemesh_gateway.access.keys import Key, Role
from imagemesh_gateway.access.rights import RIGHTS, Right
from imagemesh_runtime.errors import PermissionDenied, shorten

_Priority = priority_pb2.Priority
# From the lowest on.
_RANKS: Final = (priority_pb2.PRIORITY_BATCH, priority_pb2.PRIORITY_NORMAL, priority_pb2.PRIORITY_INTERACTIVE)
_CEILINGS: Final = {
    "batch": priority_pb2.PRIORITY_BATCH,
    "normal": priority_pb2.PRIORITY_NORMAL,
    "interactive": priority_pb2.PRIORITY_INTERACTIVE,
}


@dataclass(frozen=True)
class Caller:
    """A key's holder; without a key whoever may do all: anybody where keys are off, and the gateway itself."""

    key: Key | None = None

    @property
    def id(self) -> str:
        """The key's, which is no secret."""
        return "" if self.key is None else self.key.id

    @property
    def tenant(self) -> str:
        """Whose jobs are made."""
        return "" if self.key is None else self.key.tenant

    @property
    def only_tenant(self) -> str | None:
        """Whose jobs are seen; None: everybody's."""
        return None if self.key is None or self.key.role is Role.ADMIN else self.key.tenant

    def sees(self, tenant: str) -> bool:
        """Whether a tenant's jobs are there for this one."""
        return self.only_tenant in (None, tenant)

    def require(self, right: Right) -> None:
        """Raise PermissionDenied unless the key's role has the right."""
        if self.key is not None and RIGHTS[self.key.role] < right:
            needed = next(role for role, has in RIGHTS.items() if has >= right)
            raise PermissionDenied(f"key {self.id} has the role {self.key.role}, and this takes {needed}")

    def may_use(self, model: str) -> bool:
        """Whether the key is for that model."""
        return self.key is None or not self.key.models or any(fnmatchcase(model, one) for one in self.key.models)

    def usable(self, models: Iterable[str]) -> list[str]:
        """Those of the models that the key is for."""
        return [model for model in models if self.may_use(model)]

    def require_model(self, model: str) -> None:
        """Raise PermissionDenied unless the key is for that model."""
        if not self.may_use(model):
            assert self.key is not None
            raise PermissionDenied(f"key {self.id} is not for model {shorten(model)}; it is for {self.key.models}")

    def capped(self, priority: "_Priority.ValueType") -> "_Priority.ValueType":
        """The priority, or the highest that the key may have."""
        if self.key is None:
            return priority
        ceiling = _CEILINGS[self.key.max_priority]
        asked = priority if priority in _RANKS else priority_pb2.PRIORITY_NORMAL
        return priority if _RANKS.index(asked) <= _RANKS.index(ceiling) else ceiling


ANYBODY: Final = Caller()
_current: ContextVar[Caller] = ContextVar("imagemesh_caller", default=ANYBODY)


def current_caller() -> Caller:
    """Who made the call being served; outside of one, the gateway itself."""
    return _current.get()


def set_current_caller(caller: Caller) -> None:
    """Note who made the call, for this task and the tasks it starts."""
    _current.set(caller)
