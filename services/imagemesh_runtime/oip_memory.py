"""System shared memory that clients of the Open Inference Protocol register: their regions, attached by name."""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from imagemesh_runtime.errors import AlreadyExists, InvalidArgument, MeshError, NotFound, PermissionDenied

_FOLDER: Final = Path("/dev/shm")  # noqa: S108 where POSIX shared memory is on Linux
_KEY: Final = re.compile(r"/?([A-Za-z0-9_][A-Za-z0-9_.\-]{0,200})")
_MAX_REGIONS: Final = 1000
_MAX_BYTES: Final = 1 << 30  # of one tensor: a segment may be larger than all memory, as long as nobody fills it


@dataclass(frozen=True)
class Region:
    """A part of a segment."""

    name: str
    key: str
    offset: int
    byte_size: int
    file: FileIO

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on, a copy.

        Raises:
            InvalidArgument: they are not all within the region, more than a tensor may have, or its segment has been
                cut short.
        """
        self.check(offset, size)
        if size > _MAX_BYTES:
            raise InvalidArgument("shared_memory_byte_size", size, f"at most {_MAX_BYTES}")
        data = bytearray()
        start = self.offset + offset
        while len(data) < size:
            got = os.pread(self.file.fileno(), size - len(data), start + len(data))
            if not got:
                raise self._cut(offset, size)
            data += got
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Put the data there; errors as ``read``.

        Raises:
            MeshError: the machine has no memory for it, as happens where a segment was never filled.
        """
        self.check(offset, len(data))
        start = self.offset + offset
        if os.fstat(self.file.fileno()).st_size < start + len(data):  # or writing would make it grow again
            raise self._cut(offset, len(data))
        rest = memoryview(data)
        try:
            while rest:
                done = os.pwrite(self.file.fileno(), rest, start + len(data) - len(rest))
                rest = rest[done:]
        except OSError as error:
            raise MeshError(f"shared memory segment {self.key!r} can't be written: {error.strerror}") from error

    def check(self, offset: int, size: int) -> None:
        """Raise InvalidArgument unless ``size`` bytes from ``offset`` on are all within the region."""
        if offset < 0 or size < 0 or offset + size > self.byte_size:
            got = f"bytes {offset} to {offset + size}"
            raise InvalidArgument(
                "shared_memory_byte_size", got, f"within region {self.name!r} of {self.byte_size} bytes"
            )

    def _cut(self, offset: int, size: int) -> InvalidArgument:
        allowed = f"within the segment {self.key!r}, which has been cut short"
        return InvalidArgument("shared_memory_offset", f"bytes {offset} to {offset + size}", allowed)


class Regions:
    """The regions by name. They are read and written as files: the client may cut a segment short at any time, and
    touching memory that is mapped beyond its end would kill the process."""

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
        file, size = _attach(match[1], key)
        if byte_size < 1 or offset + byte_size > size:
            file.close()
            raise InvalidArgument("byte_size", byte_size, f"with the offset {offset} at most {size} bytes, at least 1")
        self._regions[name] = Region(name, key, offset, byte_size, file)

    def unregister(self, name: str) -> None:
        """Let go of a region, or of all of them for ""; of an unknown one there is nothing to let go of."""
        for one in [name] if name else list(self._regions):
            region = self._regions.pop(one, None)
            if region is not None:
                region.file.close()

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


def _attach(name: str, key: str) -> tuple[FileIO, int]:
    """The segment's file, and its bytes."""
    try:
        # No pipe that somebody put there may keep the server waiting.
        file = FileIO(os.open(_FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "r+")
    except OSError as error:
        raise MeshError(f"shared memory segment {key!r} can't be opened: {error.strerror}") from error
    told = os.fstat(file.fileno())
    if not stat.S_ISREG(told.st_mode):
        file.close()
        raise MeshError(f"shared memory segment {key!r} is none")
    return file, told.st_size


def require_near(peer: str) -> None:
    """Raise PermissionDenied unless the client is on this machine: another's names would mean other segments."""
    if not peer.startswith(("unix:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D")):
        raise PermissionDenied("shared memory is for clients on the server's own machine")
