"""The images' Dockerfile, read for its stages and their commands."""

import re
from pathlib import Path

from tests.support.sizes import ROOT

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
STAGES = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", DOCKERFILE, re.MULTILINE)


def stage(name: str) -> str:
    """The instructions of one stage."""
    return re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1 + [found for _, found in STAGES].index(name)]


def commands(name: str, root: Path, **arguments: str) -> list[str]:
    """A stage's RUN instructions, with the folders that they name at the file system's root below ``root``."""
    found = re.findall(r"^RUN ((?:.*\\\n)*.*)$", stage(name), re.MULTILINE)
    given = "".join(f"{key}={value}\n" for key, value in arguments.items())
    return [given + re.sub(r"(?<![\w.}/])/(opt|dist)\b", rf"{root}/\1", text.replace("\\\n", " ")) for text in found]
