"""The pictures of finished jobs, a file each."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_NAME = re.compile(r"([0-9a-f]+)\.([0-9]+)\.[0-9]+\.png")


class PictureFiles:
    """A folder of ``JOB.FENCE.INDEX.png``: an attempt that lost its job never touches the files of the one that won."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, job: str, fence: int, pictures: Sequence[bytes]) -> None:
        """Write them, and return when they are on the disk, under their names and whole."""
        for i, picture in enumerate(pictures):
            path = self._path(job, fence, i)
            unfinished = path.with_suffix(".part")
            with unfinished.open("wb") as file:
                file.write(picture)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
        self._sync_folder()

    def read(self, job: str, fence: int, count: int) -> list[bytes]:
        """The pictures of an attempt that succeeded."""
        return [self._path(job, fence, i).read_bytes() for i in range(count)]

    def delete(self, job: str) -> None:
        """Delete what all attempts at the job left."""
        for path in self._folder.glob(f"{job}.*"):
            path.unlink(missing_ok=True)

    def keep_only(self, committed: Iterable[tuple[str, int]]) -> None:
        """Delete what does not belong to one of these attempts, such as what a killed process left half written."""
        wanted = set(committed)
        for path in self._folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or (match[1], int(match[2])) not in wanted:
                path.unlink(missing_ok=True)

    def _path(self, job: str, fence: int, index: int) -> Path:
        return self._folder / f"{job}.{fence}.{index}.png"

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
