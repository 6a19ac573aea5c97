"""Parcels on the wire are protobuf's own bytes, and protobuf stays the judge of what comes in."""

import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagemesh.v1 import controlnet_service_pb2, diffusion_service_pb2, gateway_service_pb2, tensor_pb2, vae_service_pb2
from imagemesh_runtime import parcels
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.parcels import Parcel, tensors_of
from imagemesh_runtime.tensors import to_proto

# Repeated tensors, tensors within a oneof, maps of tensors, tensors two messages deep.
KINDS: tuple[type[Message], ...] = (
    tensor_pb2.Tensor,
    controlnet_service_pb2.ControlResponse,
    controlnet_service_pb2.ControlRequest,
    diffusion_service_pb2.SampleRequest,
    diffusion_service_pb2.SampleResponse,
    vae_service_pb2.DecodeLatentsResponse,
    gateway_service_pb2.GenerateRequest,
)
_F = FieldDescriptor
SCALARS: dict[int, Callable[[Random], Any]] = {
    _F.TYPE_STRING: lambda random: "".join(random.choices("abc\u00e9\U0001f600", k=random.randint(0, 8))),
    _F.TYPE_BYTES: lambda random: random.randbytes(random.choice((0, 1, 40, 200))),
    _F.TYPE_BOOL: lambda random: random.random() < 0.5,
    _F.TYPE_INT64: lambda random: random.choice((0, 1, -1, random.randint(-(2**63), 2**63 - 1))),
    _F.TYPE_UINT64: lambda random: random.choice((0, 1, 127, 128, random.randint(0, 2**64 - 1))),
    _F.TYPE_INT32: lambda random: random.choice((0, 1, -1, random.randint(-(2**31), 2**31 - 1))),
    _F.TYPE_UINT32: lambda random: random.choice((0, 1, random.randint(0, 2**32 - 1))),
    _F.TYPE_FLOAT: lambda random: random.choice((0.0, -0.0, 1.5)),
    _F.TYPE_DOUBLE: lambda random: random.choice((0.0, -0.0, random.random())),
}
MESSAGES = 25  # an example
slow = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=30)
seeds = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "SMALL", 0)


def fill(message: Any, random: Random, depth: int = 0) -> Any:
    """Set random fields of the message to random values."""
    for field in message.DESCRIPTOR.fields:
        inner = field.message_type
        if random.random() < 0.4 or (inner is not None and depth > 3):
            continue
        if inner is not None and inner.GetOptions().map_entry:
            key, value = inner.fields_by_name["key"], inner.fields_by_name["value"]
            for name in {SCALARS[key.type](random) for _ in range(random.randint(0, 3))}:
                if value.message_type is not None:
                    fill(getattr(message, field.name)[name], random, depth + 1)
                else:
                    getattr(message, field.name)[name] = SCALARS[value.type](random)
        elif inner is not None and field.is_repeated:
            for _ in range(random.randint(0, 3)):
                fill(getattr(message, field.name).add(), random, depth + 1)
        elif inner is not None:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name), random, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(scalar(field, random) for _ in range(random.randint(0, 4)))
        else:
            setattr(message, field.name, scalar(field, random))
    return message


def scalar(field: FieldDescriptor, random: Random) -> Any:
    if field.enum_type is not None:
        return random.choice(list(field.enum_type.values_by_number))
    return SCALARS[field.type](random)


def damage(data: bytes, kind: type[Message], random: Random) -> bytes:
    """The message as a broken or hostile peer might send it."""
    damaged = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(damaged))
        match random.choice(("cut", "set", "flip", "insert", "repeat", "join")):
            case "cut":
                del damaged[at : at + random.randint(1, 5)]
            case "set":
                damaged[at : at + 1] = random.randbytes(1)
            case "flip":
                damaged[at : at + 1] = bytes(byte ^ 1 << random.randint(0, 7) for byte in damaged[at : at + 1])
            case "insert":
                damaged[at:at] = random.randbytes(random.randint(1, 6))
            case "repeat":
                damaged += damaged[at:]
            case "join":
                damaged += fill(kind(), random).SerializeToString()
    return bytes(damaged)


def outcome(read: Any) -> Any:
    """What reading gives: the message's bytes, or that it can't be read."""
    try:
        return read().SerializeToString(deterministic=True)
    except DecodeError:
        return DecodeError


def restored(parcel: Parcel[Any]) -> Any:
    """The message with its payloads back inside."""
    if parcel.memory is not None:
        for tensor in tensors_of(parcel.message):
            if tensor.WhichOneof("payload") == "shared_memory":
                tensor.data = parcel.memory.read(tensor.shared_memory, "t").tobytes()
    return parcel.message


def parcelled(message: Any) -> Parcel[Any]:
    """The same message to send, its payloads apart."""
    copy = type(message).FromString(message.SerializeToString())
    parcel = Parcel[Any]()
    for tensor in tensors_of(copy):
        if tensor.WhichOneof("payload") == "data":
            array = np.frombuffer(tensor.data, np.uint8)
            tensor.shared_memory.CopyFrom(parcel.add(array).shared_memory)
    return parcel.seal(copy)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.DESCRIPTOR.name)
@slow
@given(seed=seeds)
def test_a_parcel_is_protobufs_own_bytes_and_comes_back_equal(kind: type[Message], seed: int) -> None:
    random = Random(seed)
    for _ in range(MESSAGES):
        message = fill(kind(), random)
        for tensor in tensors_of(message):
            if tensor.WhichOneof("payload") == "shared_memory":
                tensor.ClearField("shared_memory")
        wanted = message.SerializeToString(deterministic=True)
        assert parcelled(message).to_bytes() == wanted
        assert outcome(lambda wanted=wanted: restored(Parcel.from_bytes(kind, wanted))) == wanted


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.DESCRIPTOR.name)
@slow
@given(seed=seeds)
def test_damaged_messages_have_protobufs_own_outcome(kind: type[Message], seed: int) -> None:
    random = Random(seed)
    for _ in range(MESSAGES):
        whole = damage(fill(kind(), random).SerializeToString(), kind, random)
        wanted = outcome(lambda whole=whole: kind.FromString(whole))
        assert outcome(lambda whole=whole: restored(Parcel.from_bytes(kind, whole))) == wanted


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + bytes([len(content)]) + content


HEAD = b"\x08\x07\x12\x01\x04"  # uint8, shape [4]
ODD = {
    "two payloads": field(2, HEAD + field(3, b"aaaa") + field(3, b"bbbb")),
    "a payload and a reference": field(2, HEAD + field(3, b"aaaa") + field(4, b"\x10\x04")),
    "a reference and a payload": field(2, HEAD + field(4, b"\x10\x04") + field(3, b"aaaa")),
    "a reference of the peer's own": field(2, HEAD + field(4, b"\x10\x04")),
    "the tensor twice": field(2, HEAD + field(3, b"aaaa")) + field(2, field(3, b"bbbb")),
    "a payload that is a number": field(2, HEAD + b"\x18\x05"),
    "a tensor that is a number": b"\x10\x05",
    "a group": field(2, HEAD + field(3, b"aaaa")) + b"\x5b\x5c",
    "a group without an end": field(2, HEAD + field(3, b"aaaa")) + b"\x5b",
    "field 0": field(2, HEAD + field(3, b"aaaa")) + b"\x00\x00",
    "a length beyond the end": field(2, HEAD + b"\x1a\x09aaaa"),
    "an overlong tag": b"\x92\x80\x80\x80\x80\x00" + b"\x00",
    "an overlong length": field(2, HEAD + b"\x1a\x84\x80\x00aaaa"),
    "a varint of eleven bytes": field(2, HEAD + field(3, b"aaaa")) + b"\x20" + b"\xff" * 11,
    "an unknown field": field(2, HEAD + field(3, b"aaaa") + field(9, b"x")) + field(15, b"y"),
    "text that is no UTF-8": field(2, HEAD + field(3, b"aaaa")) + field(3, b"\xff"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_odd_messages_have_protobufs_own_outcome(data: bytes) -> None:
    kind = controlnet_service_pb2.ControlResponse
    assert outcome(lambda: restored(Parcel.from_bytes(kind, data))) == outcome(lambda: kind.FromString(data))


def test_an_entry_of_a_map_with_a_field_that_nobody_knows_has_protobufs_own_outcome() -> None:
    """protobuf keeps such an entry whole among the unknown fields, with its payload."""
    kind = diffusion_service_pb2.SampleRequest
    number = kind.DESCRIPTOR.fields_by_name["conditioning"].number
    entry = field(1, b"name") + field(2, HEAD + field(3, b"aaaa"))
    for data in (field(number, entry + field(5, b"")), field(number, b"\x08\x01" + entry), field(number, entry)):
        assert outcome(lambda data=data: restored(Parcel.from_bytes(kind, data))) == outcome(
            lambda data=data: kind.FromString(data)
        )


def test_payloads_are_views_of_the_message_and_cannot_be_written() -> None:
    array = np.arange(4096, dtype=np.uint8).reshape(64, 64)  # of one byte: aligned wherever it lies
    data = vae_service_pb2.DecodeLatentsResponse(images=to_proto(array), backend="x").SerializeToString()
    parcel = Parcel.from_bytes(vae_service_pb2.DecodeLatentsResponse, data)
    got = parcel.array(parcel.message.images, "images", dtypes=["uint8"], shape=(64, None))
    np.testing.assert_array_equal(got, array)
    assert parcel.message.ByteSize() < 100
    assert not got.flags.writeable
    assert np.shares_memory(got, np.frombuffer(data, np.uint8))


def test_a_parcel_is_made_without_touching_the_payloads_of_contiguous_arrays() -> None:
    array = np.arange(4096, dtype=np.float32)
    parcel = Parcel[Any]()
    parcel.add(array)
    assert np.shares_memory(parcel.payloads[0], array)


@pytest.mark.parametrize("array", [np.zeros((3, 0, 2), np.float32), np.array(2.5, np.float16), np.arange(9).T[::-2]])
def test_empty_scalar_and_strided_arrays_travel(array: np.ndarray) -> None:
    parcel = Parcel[Any]()
    kind = vae_service_pb2.DecodeLatentsResponse
    data = parcel.seal(kind(images=parcel.add(array))).to_bytes()
    assert data == kind(images=to_proto(array)).SerializeToString()
    got = Parcel.from_bytes(kind, data)
    np.testing.assert_array_equal(got.array(got.message.images, "images"), array)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FP32, shape=[3], data=b"\0" * 4000), "images.data"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FP32, shape=[-1], data=b"\0" * 4000), "images.shape"),
        (tensor_pb2.Tensor(shape=[4000], data=b"\0" * 4000), "images.dtype"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_UINT8, shape=[4000]), "images.data"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_BOOL, shape=[2], data=b"\1\2"), "images.data"),
        (
            tensor_pb2.Tensor(
                dtype=tensor_pb2.DTYPE_UINT8, shape=[4], shared_memory=tensor_pb2.SharedMemoryRef(length=4)
            ),
            "images",
        ),
    ],
)
def test_what_a_parcel_cannot_hold_is_named(tensor: tensor_pb2.Tensor, named: str) -> None:
    kind = vae_service_pb2.DecodeLatentsResponse
    parcel = Parcel.from_bytes(kind, kind(images=tensor).SerializeToString())
    with pytest.raises(InvalidArgument) as caught:
        parcel.array(parcel.message.images, "images")
    assert caught.value.field == named


def test_a_message_of_countless_fields_is_left_to_protobuf() -> None:
    kind = controlnet_service_pb2.ControlResponse
    data = field(3, b"x") * 50_000
    parcel = Parcel.from_bytes(kind, data)
    assert parcel.memory is None
    assert parcel.message.backend == "x"


def test_a_double_beside_the_tensors_is_kept() -> None:
    kind = controlnet_service_pb2.ControlRequest
    parcel = Parcel[Any]()
    step = controlnet_service_pb2.ControlStep(sample=parcel.add(np.ones(2000, np.float32)), timestep=601.5)
    data = parcel.seal(kind(step=step)).to_bytes()
    assert data.endswith(struct.pack("<d", 601.5))
    assert Parcel.from_bytes(kind, data).message.step.timestep == 601.5
