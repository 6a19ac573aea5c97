"""System shared memory that clients of the Open Inference Protocol register: their regions, attached by name."""

import mmap
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imagemesh_runtime.errors import AlreadyExists, InvalidArgument, MeshError, NotFound, PermissionDenied

_FOLDER: Final = Path("/dev/shm")  # noqa: S108 where POSIX shared memory is on Linux
_KEY: Final = re.compile(r"/?([A-Za-z0-9_][A-Za-z0-9_.\-]{0,200})")
_MAX_REGIONS: Final = 1000


@dataclass(frozen=True)
class Region:
    """A part of a segment."""

    name: str
    key: str
    offset: int
    byte_size: int
    memory: mmap.mmap

    def view(self, offset: int, size: int) -> memoryview:
        """``size`` bytes from ``offset`` on; let go of it before the region is closed.

        Raises:
            InvalidArgument: they are not all within the region.
        """
        if offset < 0 or size < 0 or offset + size > self.byte_size:
            got = f"bytes {offset} to {offset + size}"
            raise InvalidArgument(
                "shared_memory_byte_size", got, f"within region {self.name!r} of {self.byte_size} bytes"
            )
        start = self.offset + offset
        return memoryview(self.memory)[start : start + size]


class Regions:
    """The regions by name. Plain mmap: Python 3.11's SharedMemory unlinks at exit what belongs to clients."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Attach a region.

        Raises:
            AlreadyExists: the name is taken.
            InvalidArgument: the segment is smaller than that, or the key is none.
            MeshError: there is no such segment.
        """
        if name in self._regions:
            raise AlreadyExists("shared memory region", name, "another region")
        match = _KEY.fullmatch(key)
        if not name or match is None:
            raise InvalidArgument("key" if name else "name", key if name else name, "the name of a segment, no path")
        if len(self._regions) >= _MAX_REGIONS:
            raise InvalidArgument("name", name, f"one of at most {_MAX_REGIONS} regions")
        memory = _attach(match[1], key)
        if byte_size < 1 or offset + byte_size > len(memory):
            size = len(memory)
            memory.close()
            raise InvalidArgument("byte_size", byte_size, f"with the offset {offset} at most {size} bytes, at least 1")
        self._regions[name] = Region(name, key, offset, byte_size, memory)

    def unregister(self, name: str) -> None:
        """Let go of a region, or of all of them for ""; of an unknown one there is nothing to let go of."""
        for one in [name] if name else list(self._regions):
            region = self._regions.pop(one, None)
            if region is not None:
                with suppress(BufferError):  # a request under way still reads it; it goes with that
                    region.memory.close()

    def get(self, name: str) -> Region:
        """The region.

        Raises:
            NotFound: it is not registered.
        """
        if name not in self._regions:
            raise NotFound("shared memory region", name, self._regions)
        return self._regions[name]

    def told(self, name: str) -> Mapping[str, Region]:
        """The region of that name, or all for ""; errors as above."""
        return {name: self.get(name)} if name else dict(self._regions)


def _attach(file: str, key: str) -> mmap.mmap:
    try:
        descriptor = os.open(_FOLDER / file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MeshError(f"shared memory segment {key!r} can't be opened: {error.strerror}") from error
    try:
        return mmap.mmap(descriptor, 0)
    except (OSError, ValueError) as error:
        raise MeshError(f"shared memory segment {key!r} can't be mapped") from error
    finally:
        os.close(descriptor)


def require_near(peer: str) -> None:
    """Raise PermissionDenied unless the client is on this machine: another's names would mean other segments."""
    if not peer.startswith(("unix:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D")):
        raise PermissionDenied("shared memory is for clients on the server's own machine")
