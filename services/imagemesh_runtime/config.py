"""Configuration: a frozen dataclass a service, read once, then passed down.

A field ``max_batch`` of the service "vae" is taken from, first found wins: the variable ``IMAGEMESH_VAE_MAX_BATCH``,
the variable ``IMAGEMESH_MAX_BATCH``, the TOML file's ``[vae]`` table, the file's top level, the default.
"""

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from imagemesh_runtime.errors import InvalidArgument

MIB = 1 << 20


@dataclass(frozen=True)
class ServerConfig:
    """What every server has. Addresses are ``host:port`` (port 0: any free one) or, for gRPC, ``unix:/path``."""

    SERVICE: ClassVar[str] = ""

    listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"
    admin_listen: str = "127.0.0.1:0"
    # PEM files. With a certificate and its key, calls are taken by TLS alone, except on Unix sockets.
    tls_certificate: str = ""
    tls_key: str = ""
    # Whose certificates callers must show one of; empty: they need none.
    tls_client_authority: str = ""
    # Whose certificates the services that this one calls show, or "system"; empty: they are called without TLS.
    tls_authority: str = ""
    max_message_bytes: int = 256 * MIB
    # Most memory to share with each client on this machine for what it is answered, taken as it is needed; 0: none.
    shared_memory_bytes: int = 256 * MIB
    max_concurrent_calls: int = 1024
    # A call without a deadline of its own gets this one.
    request_timeout_seconds: float = 600.0
    # How long calls under way may go on after a stop was asked for.
    drain_grace_seconds: float = 30.0
    # How long ``/drain`` takes once new work is turned away: until load balancers have heard of it.
    drain_settle_seconds: float = 0.0


@dataclass(frozen=True)
class ModelServerConfig(ServerConfig):
    """What every service that runs models has."""

    # A name in the service's BACKENDS, or "auto": what was measured to be fastest, else the first one that is here.
    backend: str = "auto"
    # Folders of models, separated as in PATH; empty: the models that come with imagemesh.
    models: str = ""
    device: str = "auto"
    dtype: str = "float32"
    # Where backends that run graphs keep those they make of models; empty: in a folder of the user's cache.
    graphs: str = ""
    # Where `imagemesh tune --engines` keeps what it measured; empty: in a file of the user's state.
    engines_file: str = ""
    # Threads for one computation; 0: as many as there are cores for this process.
    threads: int = 0
    # Comma-separated names of models to load before the service is ready.
    preload: str = ""
    max_batch: int = 8
    max_queue: int = 128


Config = TypeVar("Config", bound=ServerConfig)


def load(
    cls: type[Config], env: Mapping[str, str] = os.environ, file: Path | None = None, **overrides: object
) -> Config:
    """Read a service's configuration.

    Raises:
        InvalidArgument: a value has the wrong type, the file is no TOML, or the service's table has an unknown key.
    """
    table, shared = _tables(cls, file)
    hints = get_type_hints(cls)
    values: dict[str, object] = {}
    for field in dataclasses.fields(cls):
        key = field.name.upper()
        scope = f"IMAGEMESH_{cls.SERVICE.replace('-', '_').upper()}_{key}"
        for name, source in ((scope, env), (f"IMAGEMESH_{key}", env), (field.name, table), (field.name, shared)):
            if name in source:
                values[field.name] = _convert(name, source[name], hints[field.name])
                break
    return cls(**(values | overrides))  # type: ignore[arg-type]


def _tables(cls: type[ServerConfig], file: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    if file is None:
        return {}, {}
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(str(file), str(error), "a TOML file that can be read") from error
    table = content.get(cls.SERVICE, {})
    if not isinstance(table, dict):
        raise InvalidArgument(f"{file.name}: {cls.SERVICE}", table, "a table")
    fields = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(table) - fields)
    if unknown:
        raise InvalidArgument(f"{file.name}: [{cls.SERVICE}]", unknown[0], f"one of {', '.join(sorted(fields))}")
    return table, {key: value for key, value in content.items() if not isinstance(value, dict)}


def _convert(name: str, value: object, kind: type) -> object:
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise InvalidArgument(name, value, "true or false")
        return words[str(value).lower()]
    try:
        # The environment has only strings; a file has types, and the wrong one there is a mistake.
        if not isinstance(value, str if kind is str else (str, int, kind)) or isinstance(value, bool):
            raise TypeError(f"got {type(value).__name__}")
        converted = kind(value)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError("not finite")
    except (TypeError, ValueError) as error:
        raise InvalidArgument(name, value, f"of type {kind.__name__}") from error
    return converted
