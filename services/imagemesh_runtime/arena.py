"""Memory that one process writes and another only reads: a memfd, sealed so that neither can pull it away.

It has no name, so nothing of it is left when both processes are gone, however they went. Its pages are there before
they are written, and those at the start are used again first: what has not been used costs no memory.
"""

import bisect
import fcntl
import mmap
import os
import sys
from contextlib import suppress
from typing import Final

import numpy as np

from imagemesh.v1 import tensor_pb2
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array

AVAILABLE: Final = sys.platform == "linux" and hasattr(os, "memfd_create")
PAGE: Final = mmap.PAGESIZE
ALIGNMENT: Final = 64  # of a tensor: a cache line, and more than any element type needs
_POPULATE_WRITE: Final = 23  # of madvise; Linux 5.14
_F_SEAL_FUTURE_WRITE: Final = 0x10
_SEALS: Final = 0x0001 | 0x0002 | 0x0004 | _F_SEAL_FUTURE_WRITE  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034


def padded(size: int, to: int = ALIGNMENT) -> int:
    """``size`` rounded up."""
    return -(-size // to) * to


class Arena:
    """The writer's side.

    Raises:
        OSError: the system gives no such memory.
    """

    def __init__(self, size: int) -> None:
        self.size = padded(size, PAGE)
        # To be passed on; closed by whoever does.
        self.descriptor = os.memfd_create("imagemesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self.descriptor, 0o600)
            os.ftruncate(self.descriptor, self.size)
            self._map = mmap.mmap(self.descriptor, self.size)
            fcntl.fcntl(self.descriptor, _F_ADD_SEALS, _SEALS)  # from now on nobody else can map it to write
        except BaseException:
            os.close(self.descriptor)
            raise
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._taken: list[tuple[int, int]] = []  # (start, end), in order
        self._touched = 0

    def take(self, size: int) -> int | None:
        """The start of the lowest free range of that size; None: there is none now."""
        size, start = padded(size, PAGE), 0
        for begin, end in self._taken:
            if begin - start >= size:
                break
            start = end
        if start + size > self.size or not self._there(start + size):
            return None
        bisect.insort(self._taken, (start, start + size))
        return start

    def _there(self, end: int) -> bool:
        """Whether the pages up to ``end`` exist: a write to one that can't be had would end the process."""
        if end > self._touched:
            try:
                self._map.madvise(_POPULATE_WRITE, self._touched, end - self._touched)
            except OSError:
                return False
            self._touched = end
        return True

    def give_back(self, start: int) -> None:
        """Free a range that nobody reads any more."""
        at = bisect.bisect_left(self._taken, (start, 0))
        if at == len(self._taken) or self._taken[at][0] != start:
            raise ValueError(f"nothing was taken at {start}")
        del self._taken[at]

    @property
    def in_use(self) -> int:
        """Bytes that are taken."""
        return sum(end - start for start, end in self._taken)

    def write(self, at: int, payload: Array) -> None:
        """Copy uint8 ``payload`` into a range that was taken."""
        self._bytes[at : at + len(payload)] = payload

    def close(self) -> None:
        """Unmap it here; the reader's mapping stays valid."""
        del self._bytes
        self._map.close()


class Mapping:
    """The reader's side of an arena.

    Raises:
        OSError: the descriptor is no arena of that size that is sealed against its owner, too.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
        if seals & _SEALS != _SEALS or os.fstat(descriptor).st_size != size:
            raise OSError("the memory is not sealed, or of another size")
        self.size = size
        self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        with suppress(OSError):
            self._map.madvise(mmap.MADV_DONTFORK)

    def whole(self) -> Array:
        """All of it, as an array of its own: views of it keep that one alive."""
        return np.frombuffer(self._map, np.uint8)


class Window:
    """What one message may read of a mapping."""

    path = "shm"

    def __init__(self, whole: Array, generation: int, size: int) -> None:
        self._whole = whole
        self._generation = generation
        self.size = size

    def read(self, where: tensor_pb2.SharedMemoryRef, field: str) -> Array:
        """The bytes of a range; errors as ``tensors.Memory``."""
        if where.generation != self._generation:
            allowed = f"{self._generation}, the message's number"
            raise InvalidArgument(f"{field}.shared_memory.generation", where.generation, allowed)
        limit = len(self._whole)
        if where.offset % ALIGNMENT or where.offset > limit:
            allowed = f"a multiple of {ALIGNMENT} of at most {limit}"
            raise InvalidArgument(f"{field}.shared_memory.offset", where.offset, allowed)
        if where.length > limit - where.offset:
            allowed = f"at most {limit - where.offset} from {where.offset} on"
            raise InvalidArgument(f"{field}.shared_memory.length", where.length, allowed)
        return self._whole[where.offset : where.offset + where.length]
