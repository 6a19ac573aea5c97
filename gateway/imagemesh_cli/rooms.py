"""What the command can start: the five services and the gateway, by name; nothing is imported before it is used."""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from imagemesh_runtime.config import ServerConfig

Config = TypeVar("Config", bound="ServerConfig")


@dataclass(frozen=True)
class Room:
    """A server's package and the name of its configuration in there."""

    package: str
    config_name: str

    def config(self) -> Any:
        """The class of its configuration."""
        return resolve_name(f"{self.package}.config:{self.config_name}")

    def create(self, *args: Any) -> Any:
        """The server, not yet started; a service takes its configuration and a lane, the gateway only the former."""
        return resolve_name(f"{self.package}.service:create")(*args)


# In the order in which they start: who is called stands before who calls.
SERVICES: Mapping[str, Room] = {
    "controlnet": Room("imagemesh_services.controlnet", "ControlNetConfig"),
    "text-encoder": Room("imagemesh_services.text_encoder", "TextEncoderConfig"),
    "vae": Room("imagemesh_services.vae", "VaeConfig"),
    "vit": Room("imagemesh_services.vit", "VitConfig"),
    "diffusion": Room("imagemesh_services.diffusion", "DiffusionConfig"),
}
GATEWAY = Room("imagemesh_gateway", "GatewayConfig")


def configure(cls: type[Config], settings: Mapping[str, str], file: Path | None = None) -> Config:
    """The configuration from ``settings``, the environment and the file, in this order.

    Raises:
        InvalidArgument: a setting that the server doesn't have or a value of the wrong type; or the file is no TOML.
    """
    from imagemesh_runtime.config import load
    from imagemesh_runtime.errors import InvalidArgument

    fields = [field.name for field in dataclasses.fields(cls)]
    for name in settings:
        if name not in fields:
            raise InvalidArgument(f"setting of {cls.SERVICE}", name, f"one of {', '.join(sorted(fields))}")
    scope = f"IMAGEMESH_{cls.SERVICE.replace('-', '_')}_"
    chosen = {f"{scope}{name}".upper(): value for name, value in settings.items()}
    try:
        return load(cls, env={**os.environ, **chosen}, file=file)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument("config", str(file), f"a TOML file ({error})") from error
