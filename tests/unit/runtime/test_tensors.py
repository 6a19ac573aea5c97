"""The tensor codec: every array comes back equal, and no hostile message gets through."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from imagemesh.v1 import tensor_pb2
from imagemesh_runtime.errors import InvalidArgument, shorten
from imagemesh_runtime.tensors import MAX_RANK, from_proto, map_from_proto, map_to_proto, require_finite, to_proto

DTYPES = {
    tensor_pb2.DTYPE_FP32: np.dtype("float32"),
    tensor_pb2.DTYPE_FP16: np.dtype("float16"),
    tensor_pb2.DTYPE_BF16: np.dtype(ml_dtypes.bfloat16),
    tensor_pb2.DTYPE_FP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    tensor_pb2.DTYPE_FP8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    tensor_pb2.DTYPE_INT8: np.dtype("int8"),
    tensor_pb2.DTYPE_UINT8: np.dtype("uint8"),
    tensor_pb2.DTYPE_INT32: np.dtype("int32"),
    tensor_pb2.DTYPE_INT64: np.dtype("int64"),
    tensor_pb2.DTYPE_BOOL: np.dtype("bool"),
}
shapes = hnp.array_shapes(min_dims=0, max_dims=MAX_RANK, min_side=0, max_side=4)


def fill(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    return (np.arange(count) % 2 if dtype.kind == "b" else np.arange(count) % 7).astype(dtype).reshape(shape)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()  # bitwise, so that NaN equals itself


def tensor(shape: list[int], data: bytes = b"", dtype: int = tensor_pb2.DTYPE_FP32) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)


@pytest.mark.parametrize(("enum", "dtype"), DTYPES.items(), ids=lambda value: str(value))
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)])
def test_every_dtype_comes_back_equal(enum: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = fill(dtype, shape)
    message = to_proto(array)
    assert message.dtype == enum
    assert_same(from_proto(tensor_pb2.Tensor.FromString(message.SerializeToString()), "t"), array)


def test_every_dtype_of_the_contract_is_covered() -> None:
    assert set(DTYPES) == set(tensor_pb2.Dtype.values()) - {tensor_pb2.DTYPE_UNSPECIFIED}


@given(st.sampled_from([np.float32, np.float16, np.int8, np.uint8, np.int32, np.int64, np.bool_]), shapes, st.data())
def test_any_array_comes_back_equal(dtype: type, shape: tuple[int, ...], data: st.DataObject) -> None:
    array = data.draw(hnp.arrays(dtype, shape))
    assert_same(from_proto(to_proto(array), "t"), array)


@given(hnp.arrays(np.uint16, shapes))
def test_every_bfloat16_pattern_comes_back_equal(bits: np.ndarray) -> None:
    array = bits.view(ml_dtypes.bfloat16)
    assert_same(from_proto(to_proto(array), "t"), array)


@given(hnp.arrays(np.int32, hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5)), st.data())
def test_any_view_comes_back_equal(array: np.ndarray, data: st.DataObject) -> None:
    view = array[data.draw(hnp.basic_indices(array.shape))].T
    assert_same(from_proto(to_proto(np.asarray(view)), "t"), np.ascontiguousarray(view).reshape(view.shape))


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[::-2, 1:], lambda a: np.broadcast_to(a[0], (5, 4))])
def test_strided_views_come_back_equal(view) -> None:
    array = view(np.arange(12, dtype=np.float32).reshape(3, 4))
    assert_same(from_proto(to_proto(array), "t"), np.ascontiguousarray(array))


def test_big_endian_arrays_travel_little_endian() -> None:
    message = to_proto(np.array([1, 2], dtype=">i4"))
    assert message.data == b"\1\0\0\0\2\0\0\0"
    assert from_proto(message, "t").tolist() == [1, 2]


def test_multi_byte_elements_are_little_endian() -> None:
    assert to_proto(np.array([1.0], dtype=ml_dtypes.bfloat16)).data == b"\x80\x3f"


@pytest.mark.parametrize("dtype", ["float64", "complex64", "object", "U3", "uint16", "M8[s]"])
def test_dtypes_outside_the_contract_are_a_type_error(dtype: str) -> None:
    with pytest.raises(TypeError, match="no tensor dtype"):
        to_proto(np.zeros(2, dtype=dtype))


def test_decoded_arrays_share_the_bytes_and_cannot_be_written() -> None:
    array = from_proto(to_proto(np.zeros(3, dtype=np.float32)), "t")
    assert not array.flags.writeable
    assert not array.flags.owndata


def test_maps_come_back_equal_and_errors_name_the_entry() -> None:
    arrays = {"a": np.ones((2, 2), dtype=np.float32), "b": np.array(3, dtype=np.int64)}
    for name, array in map_from_proto(map_to_proto(arrays), "inputs").items():
        assert_same(array, arrays[name])
    with pytest.raises(InvalidArgument) as caught:
        map_from_proto({"x": tensor([2])}, "inputs")
    assert caught.value.field == "inputs['x'].data"


def test_a_hostile_entry_name_is_cut_in_errors() -> None:
    with pytest.raises(InvalidArgument) as caught:
        map_from_proto({"x" * 100_000: tensor([2])}, "inputs")
    assert len(str(caught.value)) < 300


HUGE = 2**62
HOSTILE = {
    "too few bytes": (tensor([2, 2], b"\0" * 15), "t.data"),
    "too many bytes": (tensor([2, 2], b"\0" * 17), "t.data"),
    "no payload": (tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FP32, shape=[2]), "t.data"),
    "no payload for a scalar": (tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FP32), "t.data"),
    "bytes for a zero-size shape": (tensor([0, 3], b"\0" * 4), "t.data"),
    "negative extent": (tensor([-1]), "t.shape"),
    "negative extents whose product fits": (tensor([-2, -2], b"\0" * 16), "t.shape"),
    "overflowing shape": (tensor([HUGE, HUGE]), "t.shape"),
    "shape that overflows to 0 in 64 bits": (tensor([2**32, 2**32]), "t.shape"),
    "zero beside overflowing extents": (tensor([0, HUGE, HUGE]), "t.shape"),
    "overflowing extent beside zero": (tensor([2**63 - 1, 0]), "t.shape"),
    "nine dimensions": (tensor([1] * 9, b"\0" * 4), "t.shape"),
    "a million dimensions": (tensor([1] * 1_000_000, b"\0" * 4), "t.shape"),
    "unspecified dtype": (tensor([1], b"\0" * 4, tensor_pb2.DTYPE_UNSPECIFIED), "t.dtype"),
    "unknown dtype": (tensor([1], b"\0" * 4, 99), "t.dtype"),
    "a bool that is neither 0 nor 1": (tensor([2], b"\1\2", tensor_pb2.DTYPE_BOOL), "t.data"),
    "shared memory that was not negotiated": (
        tensor_pb2.Tensor(
            dtype=tensor_pb2.DTYPE_FP32, shape=[1], shared_memory=tensor_pb2.SharedMemoryRef(offset=0, length=4)
        ),
        "t",
    ),
}


@pytest.mark.parametrize(("message", "field"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tensors_are_invalid_arguments_that_name_the_field(message: tensor_pb2.Tensor, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        from_proto(message, "t")
    assert caught.value.field == field
    assert len(str(caught.value)) < 400


@given(
    st.integers(0, 12),
    st.lists(st.one_of(st.integers(-2, 4), st.integers(-(2**63), 2**63 - 1)), max_size=10),
    st.binary(max_size=64),
)
def test_any_message_is_an_array_or_an_invalid_argument(dtype: int, shape: list[int], data: bytes) -> None:
    try:
        array = from_proto(tensor(shape, data, dtype), "t")
    except InvalidArgument:
        return
    assert array.tobytes() == data


def test_the_error_of_an_unspecified_dtype_names_the_allowed_ones() -> None:
    with pytest.raises(InvalidArgument) as caught:
        from_proto(tensor([1], b"\0" * 4, tensor_pb2.DTYPE_UNSPECIFIED), "t")
    for name in ("DTYPE_FP32", "DTYPE_BF16", "DTYPE_FP8_E4M3", "DTYPE_BOOL"):
        assert name in str(caught.value)
    assert "UNSPECIFIED" not in caught.value.description


def test_only_the_dtypes_asked_for_pass() -> None:
    message = to_proto(np.zeros(1, dtype=np.int8))
    with pytest.raises(InvalidArgument, match="must be one of float16, float32, got 'int8'"):
        from_proto(message, "t", dtypes=["float32", "float16"])
    assert from_proto(message, "t", dtypes=["int8"]).shape == (1,)


@pytest.mark.parametrize("wanted", [(1, 2), (2, None, None), (), (None, 4)])
def test_only_the_shape_asked_for_passes(wanted: tuple[int | None, ...]) -> None:
    message = to_proto(np.zeros((2, 3), dtype=np.int8))
    assert from_proto(message, "t", shape=(2, None)).shape == (2, 3)
    with pytest.raises(InvalidArgument) as caught:
        from_proto(message, "t", shape=wanted)
    assert caught.value.field == "t.shape"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(dtype: type, bad: float) -> None:
    with pytest.raises(InvalidArgument, match="1 of 3 elements"):
        require_finite(np.array([0, bad, 1], dtype=np.float32).astype(dtype), "t")


def test_the_nan_of_float8_e4m3_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="1 of 2 elements"):
        require_finite(np.array([np.nan, 448.0], dtype=np.float32).astype(ml_dtypes.float8_e4m3fn), "t")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_finite_arrays_of_every_dtype_are_handed_back(dtype: np.dtype) -> None:
    array = fill(dtype, (2, 3))
    assert require_finite(array, "t") is array


@given(st.one_of(st.text(), st.binary(), st.integers(), st.lists(st.text())))
def test_shortened_values_are_short(value: object) -> None:
    assert len(shorten(value)) <= 80
