"""Shared memory: who may do what with it, and that no range is handed out twice."""

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemesh.v1 import tensor_pb2
from imagemesh_runtime.arena import PAGE, Arena, Mapping, Window
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import from_proto

SIZE = 16 * PAGE


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(SIZE)
    yield arena
    os.close(arena.descriptor)
    arena.close()


@pytest.fixture
def whole(arena: Arena) -> np.ndarray:
    return Mapping(arena.descriptor, SIZE).whole()


def reference(offset: int, length: int, generation: int = 1) -> tensor_pb2.SharedMemoryRef:
    return tensor_pb2.SharedMemoryRef(offset=offset, length=length, generation=generation)


def test_what_is_written_here_is_read_there(arena: Arena, whole: np.ndarray) -> None:
    start = arena.take(100)
    assert start is not None
    arena.write(start, np.arange(100, dtype=np.uint8))
    np.testing.assert_array_equal(Window(whole, 1, 100).read(reference(start, 100), "t"), np.arange(100))


def test_the_reader_cannot_write_shrink_or_grow_it(arena: Arena, whole: np.ndarray) -> None:
    assert not whole.flags.writeable
    with pytest.raises(PermissionError):
        mmap.mmap(arena.descriptor, SIZE)
    with pytest.raises(PermissionError):
        os.pwrite(arena.descriptor, b"x", 0)
    for size in (0, SIZE - PAGE, SIZE + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.descriptor, size)


def test_it_is_its_owners_alone_and_has_no_name(arena: Arena) -> None:
    told = os.fstat(arena.descriptor)
    assert told.st_mode & 0o777 == 0o600
    assert told.st_nlink == 0
    assert not os.get_inheritable(arena.descriptor)


def test_the_mapping_outlives_the_writer(arena: Arena, whole: np.ndarray) -> None:
    other = Arena(SIZE)
    mapped = Mapping(other.descriptor, SIZE).whole()
    assert other.take(PAGE) == 0
    other.write(0, np.full(PAGE, 7, np.uint8))
    os.close(other.descriptor)
    other.close()
    assert mapped[:PAGE].min() == 7


@pytest.mark.parametrize(("sealed", "size"), [(False, SIZE), (True, SIZE - PAGE), (True, SIZE + PAGE)])
def test_memory_that_could_be_pulled_away_is_not_mapped(arena: Arena, sealed: bool, size: int) -> None:
    """A reader of a file that shrinks is killed by the system."""
    descriptor = arena.descriptor if sealed else os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    if not sealed:
        os.ftruncate(descriptor, SIZE)
    with pytest.raises(OSError, match="not sealed, or of another size"):
        Mapping(descriptor, size)
    if not sealed:
        os.close(descriptor)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 6 * PAGE), st.just(0)), max_size=40), st.randoms(use_true_random=False))
def test_no_two_ranges_overlap_and_the_lowest_is_taken(sizes: list[int], random) -> None:
    arena, taken = Arena(SIZE), {}
    for size in sizes:  # 0: one is given back
        if size == 0:
            if taken:
                arena.give_back(start := random.choice(sorted(taken)))
                del taken[start]
            continue
        start = arena.take(size)
        pages = {start: -(-size // PAGE) * PAGE} if start is not None else {}
        free = [at for at in range(0, SIZE, PAGE) if not any(s < at + -(-size // PAGE) * PAGE and at < s + n
                for s, n in taken.items()) and at + size <= SIZE]  # fmt: skip
        assert start == (free[0] if free else None)
        taken |= pages
    assert arena.in_use == sum(taken.values())
    os.close(arena.descriptor)
    arena.close()


def test_what_was_not_taken_cannot_be_given_back(arena: Arena) -> None:
    with pytest.raises(ValueError, match="nothing was taken"):
        arena.give_back(0)


def test_what_is_not_used_costs_no_memory() -> None:
    arena = Arena(1 << 30)
    arena.take(10 * PAGE)
    assert os.fstat(arena.descriptor).st_blocks * 512 == 10 * PAGE
    os.close(arena.descriptor)
    arena.close()


@pytest.mark.parametrize(
    ("where", "named"),
    [
        (reference(0, 16, generation=0), "generation"),
        (reference(0, 16, generation=2), "generation"),
        (reference(8, 16), "offset"),
        (reference(SIZE + 64, 0), "offset"),
        (reference(1 << 63, 16), "offset"),
        (reference(0, SIZE + 1), "length"),
        (reference(SIZE - 64, 65), "length"),
        (reference(64, (1 << 64) - 1), "length"),
    ],
)
def test_a_reference_beyond_the_message_is_an_invalid_argument(
    whole: np.ndarray, where: tensor_pb2.SharedMemoryRef, named: str
) -> None:
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FP32, shape=[4], shared_memory=where)
    with pytest.raises(InvalidArgument) as caught:
        from_proto(tensor, "t", memory=Window(whole, 1, 16))
    assert caught.value.field == f"t.shared_memory.{named}"


@pytest.mark.parametrize(
    ("shape", "dtype"), [([5], "FP32"), ([4], "INT64"), ([4], "FP16"), ([], "FP32"), ([0], "FP32")]
)
def test_a_range_that_is_not_the_tensors_size_is_an_invalid_argument(
    whole: np.ndarray, shape: list[int], dtype: str
) -> None:
    tensor = tensor_pb2.Tensor(
        dtype=tensor_pb2.Dtype.Value(f"DTYPE_{dtype}"), shape=shape, shared_memory=reference(0, 16)
    )
    with pytest.raises(InvalidArgument, match="bytes for shape"):
        from_proto(tensor, "t", memory=Window(whole, 1, 16))
