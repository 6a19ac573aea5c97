"""The options of the commands that make and revoke API keys."""

import os
import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from imagemesh_cli.option_types import file_to_write, positive, whole

_VARIABLES: Final = ("IMAGEMESH_GATEWAY_KEYS_FILE", "IMAGEMESH_KEYS_FILE")
_SECONDS: Final = {"m": 60, "h": 3600, "d": 86400}
_TIMES: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
KEYS_HELP: Final = "API keys of a gateway: who may call it, for what, and how much. The file keeps only their hashes."


def duration(text: str) -> int:
    """Seconds, of "30m", "12h" or "90d"."""
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text, re.ASCII)
    if match is None or not int(match[1]):
        raise ArgumentTypeError(f"must be minutes, hours or days from 1 on, such as 30m, 12h or 90d, got {text!r}")
    return int(match[1]) * _SECONDS[match[2]]


def quantity(text: str) -> int:
    """A whole number from 1, also written as "500M" or "1.5G"."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([kMGT]?)", text, re.ASCII)
    value = 0 if match is None else round(float(match[1]) * _TIMES[match[2]])
    if not 1 <= value <= 1 << 62:
        raise ArgumentTypeError(f"must be a number from 1, such as 20000, 500M or 1.5G, got {text!r}")
    return value


def add_keys(parser: ArgumentParser) -> None:
    """``imagemesh keys create|list|revoke``."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: str, help: str) -> Any:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=f"key_commands:{run}")
        _file(added)
        added.add_argument("--json", action="store_true", help="answer as JSON")
        return added

    create = command("create", "create_key", "make a key, and tell it: this once, since only its hash is kept")
    create.add_argument("--name", default="", metavar="TEXT", help="whose it is or what it is for, for people")
    create.add_argument(
        "--tenant", default="default", metavar="NAME", help="whose jobs it makes and sees (default: %(default)s)"
    )
    _rights(create.add_argument)
    _limits(create.add_argument)
    command("list", "list_keys", "list the keys, without their secrets")
    revoke = command("revoke", "revoke_key", "revoke a key; a gateway that runs knows within seconds")
    revoke.add_argument("key", metavar="ID", help="as imagemesh keys list tells it")


def _file(parser: ArgumentParser) -> None:
    given = next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), None)
    parser.add_argument(
        "--file", type=file_to_write, default=None if given is None else Path(given), required=given is None,
        metavar="FILE", help=f"the gateway's keys_file (default: ${_VARIABLES[0]})",
    )  # fmt: skip


def _rights(add: Callable[..., Any]) -> None:
    add("--role", choices=["viewer", "user", "admin"], default="user", help="what it may (default: user)")
    add("--expires", type=duration, metavar="TIME", help="after that, such as 90d or 12h (default: never)")
    add(
        "--model", action="append", default=[], metavar="NAME",
        help="the only one it may use, with * and ? as in a shell; repeatable (default: all)",
    )  # fmt: skip
    add(
        "--max-priority", choices=["interactive", "normal", "batch"], default="interactive",
        help="requests of a higher one get this (default: interactive)",
    )  # fmt: skip


def _limits(add: Callable[..., Any]) -> None:
    add("--calls-per-minute", type=positive, metavar="N", help="over all APIs (default: no limit)")
    add("--burst", type=whole(1, 1_000_000), metavar="N", help="calls at once (default: those of a minute)")
    add(
        "--pixel-steps-per-day", type=quantity, metavar="N",
        help="width x height x steps of all pictures of a day (UTC), such as 500M (default: no limit)",
    )  # fmt: skip
    add("--max-jobs", type=whole(1, 1_000_000), metavar="N", help="generations that wait or run (default: no limit)")
