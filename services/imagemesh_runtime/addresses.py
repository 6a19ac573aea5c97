"""What may stand where a server's address is wanted; imports nothing at once, so that a command's help stays quick."""

from typing import Final

WANTED: Final = "host:port such as 127.0.0.1:50050, or unix:/path, and no URL"

# gRPC's own ways to name a server, which it checks by itself.
_SCHEMES: Final = ("dns:///", "ipv4:", "ipv6:", "unix-abstract:")


def is_address(text: str) -> bool:
    """Whether gRPC can be asked to connect to this: ``host:port``, ``[IPv6]:port``, ``unix:/path``."""
    if text.startswith("unix:"):
        return len(text) > len("unix:")
    if text.startswith(_SCHEMES):
        return True
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or "/" in host or any(map(str.isspace, text)) or (":" in host and not bracketed):
        return False
    return port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16


def is_local(address: str) -> bool:
    """Whether a server that listens there can be reached from this machine alone: loopback, or a Unix socket."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host.lower() == "localhost":
        return True
    import ipaddress  # here, so that a command's help stays quick

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
