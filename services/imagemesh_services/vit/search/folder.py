"""Where indexes lie, and what they may be called."""

import os
import re
from pathlib import Path
from typing import Final

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.vit.config import VitConfig

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)


def index_root(config: VitConfig) -> Path:
    """The folder of ``index_root``, or one of the user's state."""
    if config.index_root:
        return Path(config.index_root).expanduser()
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(Path.home(), ".local", "state")
    return Path(state) / "imagemesh" / "indexes"


def check_name(name: str) -> str:
    """The name, if it is one; so it is no path either, and another one also where a file system ignores case.

    Raises:
        InvalidArgument: it is none.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            "index", name, "1 to 64 lower-case letters, digits, - and _, of which the first is a letter or a digit"
        )
    return name
