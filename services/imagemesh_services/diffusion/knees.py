"""The knees that ``imagemesh tune`` found, in a file of the user's state."""

import dataclasses
import json
import logging
import os
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

from imagemesh_services.diffusion.config import DiffusionConfig

log = logging.getLogger(__name__)

_VERSION: Final = 1
MAX_ROWS: Final = 4096
_KEPT: Final = 1000


@dataclass(frozen=True)
class Knee:
    """The rows of a batch that a model of this fingerprint should have at most, at one size on one device.

    A forward of so many rows takes seconds_a_row * rows + seconds_a_forward.

    Attributes:
        limited_by: "knee", "memory" (there was none for more) or "bound" (no more were tried).
    """

    fingerprint: str
    device: str
    dtype: str
    width: int
    height: int
    rows: int
    seconds_a_row: float
    seconds_a_forward: float
    limited_by: str = "knee"

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What it holds for; it is trusted for nothing else."""
        return (self.fingerprint, self.device, self.dtype, self.width, self.height)


def knees_path(config: DiffusionConfig, env: Mapping[str, str] = os.environ) -> Path:
    """The configured file, or one in the user's state."""
    if config.knees_file:
        return Path(config.knees_file)
    state = env.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(state, "imagemesh", "knees.json")


def read_knees(path: Path) -> list[Knee]:
    """What the file holds; an entry that can't be right, or a file that is none, is left out with a warning."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            raise ValueError(f"not a file of knees of version {_VERSION}")
        return [_checked(entry) for entry in content["knees"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("no knees are taken from %s: %s: %s", path, type(error).__name__, error)
        return []


def write_knees(path: Path, found: Iterable[Knee]) -> None:
    """Put these in the place of those for the same; who reads meanwhile sees all of the old file or of the new one."""
    kept = {knee.key: knee for knee in read_knees(path)}
    for knee in found:
        kept.pop(knee.key, None)
        kept[knee.key] = knee
    content = {"version": _VERSION, "knees": [dataclasses.asdict(knee) for knee in list(kept.values())[-_KEPT:]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def rows_on_file(config: DiffusionConfig, device: str, dtype: str) -> dict[Hashable, int]:
    """The most rows by (fingerprint, width, height), for one device and element type."""
    knees = read_knees(knees_path(config))
    return {
        (knee.fingerprint, knee.width, knee.height): knee.rows
        for knee in knees
        if (knee.device, knee.dtype) == (device, dtype)
    }


def _checked(entry: Mapping[str, Any]) -> Knee:
    """The entry as a knee.

    Raises:
        ValueError, TypeError: a field is missing, unknown, of the wrong type or out of its bounds.
    """
    knee = Knee(**entry)
    for field in dataclasses.fields(Knee):
        value, kind = getattr(knee, field.name), field.type
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):  # type: ignore[arg-type]
            raise TypeError(f"{field.name} is {value!r}")
    if not (1 <= knee.rows <= MAX_ROWS and knee.width > 0 and knee.height > 0):
        raise ValueError(f"{knee.rows} rows at {knee.width}x{knee.height}")
    return knee
