"""API keys: what is shown once, and what is kept of it, in a file of hashes."""

import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from imagemesh_runtime.errors import FailedPrecondition, NotFound

# "im", the id, which is no secret, and 256 bits that are.
_TOKEN: Final = re.compile(r"im_([0-9a-f]{10})_[A-Za-z0-9_-]{43}", re.ASCII)
MAX_KEYS: Final = 10_000


class Role(StrEnum):
    """What a key is for; each may do what those before it may."""

    # Looks: lists, its tenant's jobs, metrics.
    VIEWER = "viewer"
    # Makes pictures, and understands them.
    USER = "user"
    # Sees and ends the jobs of all tenants, and changes what all tenants share.
    ADMIN = "admin"


class Key(BaseModel):
    """What is kept of a key. Limits that are None are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{10}$")]
    # Of the whole token, in hexadecimal. It has 256 random bits, so that nothing slower than a hash is needed.
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    # For people.
    name: Annotated[str, Field(max_length=100)] = ""
    # Whose jobs it sees.
    tenant: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    role: Role = Role.USER
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    # Names of models, with * and ? as in a shell; none: all models.
    models: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    # A request of a higher priority gets this one.
    max_priority: Literal["interactive", "normal", "batch"] = "interactive"
    # Calls, and messages of streams; as many at once as ``burst``, or those of a minute.
    calls_per_minute: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    # Width x height x steps of all pictures, in a day by UTC.
    pixel_steps_per_day: Annotated[int, Field(ge=1, le=1 << 62)] | None = None
    # Generations that wait or run.
    max_jobs: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    @property
    def state(self) -> str:
        """In a word: "active", "expired" or "revoked"."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= datetime.now(UTC) else "active"


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    keys: Annotated[list[Key], Field(max_length=MAX_KEYS)] = Field(default_factory=list)


def new_token() -> tuple[str, str]:
    """The id of a new key, and the key itself."""
    key = secrets.token_hex(5)
    return key, f"im_{key}_{secrets.token_urlsafe(32)}"


def id_of(token: str) -> str | None:
    """The id in a key; None: it is none."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else match[1]


def digest_of(token: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file, by id.

    Raises:
        FailedPrecondition: it can't be read, or is no file of keys.
    """
    try:
        content = _Content.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FailedPrecondition(f"keys file {path} can't be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]  # a key that was put there is not to be shown
        where = ".".join(map(str, first["loc"]))
        raise FailedPrecondition(f"keys file {path}: {where or 'it'}: {first['msg']}") from None
    keys = {key.id: key for key in content.keys}
    if len(keys) < len(content.keys):
        raise FailedPrecondition(f"keys file {path}: two keys have the same id")
    return keys


def add_key(path: Path, key: Key) -> None:
    """Add a key to a file, which is made if it isn't there; errors as ``read_keys``."""
    with _changing(path) as keys:
        keys[key.id] = key


def revoke_key(path: Path, key: str) -> Key:
    """Revoke a key of a file, and answer how it stands now.

    Raises:
        NotFound: there is none of that id.
        FailedPrecondition: as ``read_keys``.
    """
    with _changing(path) as keys:
        if key not in keys:
            raise NotFound("key", key, keys)
        if keys[key].revoked is None:
            keys[key] = keys[key].model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        return keys[key]


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Key]]:
    """The keys, which are written when the block ends; one process at a time is at it."""
    try:
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = read_keys(path) if path.exists() else {}
            yield keys
            _replace(path, _Content(keys=list(keys.values())).model_dump_json(indent=1, exclude_none=True))
    except OSError as error:
        raise FailedPrecondition(f"keys file {path} can't be written: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    """Write the file whole or not at all. A new one is for its owner alone; another stays whose it is and who may read
    it: a gateway that can't read it any more would not hear of a key that was revoked."""
    before = path.stat() if path.exists() else None
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            if before is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
