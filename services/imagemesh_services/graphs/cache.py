"""Graphs on the disk: found again by what they were made of, never trusted without a look.

A graph's name is a hash of the weights and of the versions that it was made of and with, so one that is stale or
another version's is simply not found. It lies in a folder that appears whole or not at all, with its files' hashes.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from imagemesh_runtime.errors import FailedPrecondition

log = logging.getLogger(__name__)

GRAPH: Final = "model.onnx"
_SUMS: Final = "sums.json"
_VERSION: Final = "1"  # of how graphs are made here
_MAKING: Final = ".making-"
_LEFT: Final = 24 * 3600.0  # seconds after which nobody makes a graph any more
_READ: Final = (".json", ".safetensors")  # of a model's folder: what its module is made of


def graphs_folder(configured: str, env: Mapping[str, str] = os.environ) -> Path:
    """The configured folder, or one in the user's cache."""
    if configured:
        return Path(configured).expanduser()
    cache = env.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache, "imagemesh", "graphs")


def hash_of(sources: Iterable[Path], *marks: str) -> str:
    """SHA-256, in hexadecimal, of the configurations and weights in the folders, of single files, and of ``marks``."""
    digest = hashlib.sha256("\0".join((_VERSION, *marks)).encode())
    for source in sources:
        files = [source] if source.is_file() else [file for file in sorted(source.iterdir()) if file.suffix in _READ]
        for file in files:
            digest.update(f"\0{file.name}\0{_sum(file)}".encode())
    return digest.hexdigest()


class GraphCache:
    """A folder of graphs, which any number of processes may share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find_or_make(self, key: str, write: Callable[[Path], None]) -> Path:
        """The graph called ``key``, written by ``write`` (which gets the path) if it is not there or damaged.

        Raises:
            FailedPrecondition: the folder can't be written to.
        """
        folder = self._root / key
        if self._is_whole(folder):
            return folder / GRAPH
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with tempfile.TemporaryDirectory(dir=self._root, prefix=_MAKING, ignore_cleanup_errors=True) as room:
                made = Path(room) / key
                made.mkdir()
                write(made / GRAPH)
                sums = {file.name: _sum(file) for file in sorted(made.iterdir())}
                (made / _SUMS).write_text(json.dumps(sums))
                self._put(made, folder)
        except OSError as error:
            raise FailedPrecondition(
                f"no graph can be kept in {self._root}: {error.strerror}; set graphs (IMAGEMESH_GRAPHS) to a folder"
                " that can be written to"
            ) from error
        return folder / GRAPH

    def _sweep(self) -> None:
        """Remove what processes that were killed had begun."""
        for room in self._root.glob(f"{_MAKING}*"):
            try:
                left = time.time() - room.stat().st_mtime > _LEFT
            except FileNotFoundError:  # it was made, or swept, meanwhile
                continue
            if left:
                log.warning("%s is removed: it was never made to its end", room)
                shutil.rmtree(room, ignore_errors=True)

    def _put(self, made: Path, folder: Path) -> None:
        try:
            made.rename(folder)
        except OSError:  # there is one: another process's, or a damaged one
            if self._is_whole(folder):
                return
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)

    def _is_whole(self, folder: Path) -> bool:
        if not folder.is_dir():
            return False
        try:
            sums = json.loads((folder / _SUMS).read_text())
            found = {file.name: _sum(file) for file in sorted(folder.iterdir()) if file.name != _SUMS}
        except (OSError, ValueError) as error:
            log.warning("graph %s is damaged and made anew: %s", folder, error)
            return False
        if found != sums or GRAPH not in found:
            log.warning("graph %s is damaged and made anew: its files are not those that were written", folder)
            return False
        return True


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
