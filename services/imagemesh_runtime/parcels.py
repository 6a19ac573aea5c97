"""Messages whose tensors travel beside them: protobuf never copies the payloads.

On the wire a parcel is the message, byte for byte: whoever knows only protobuf reads and writes the same. It is made
with one join of the payloads as they lie in memory, and read by cutting the payloads out as views. See
docs/decisions/tensors-beside-protobuf.md.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from imagemesh.v1 import tensor_pb2
from imagemesh_runtime import wire
from imagemesh_runtime.tensors import Array, Memory, from_proto, headed

M = TypeVar("M", bound=Message)
F = TypeVar("F", bound=Callable[..., Any])
# Below this protobuf is as fast.
SMALL: Final = 4096


class Parcel(Generic[M]):
    """A message, and apart from it what its tensors refer to.

    To send one: ``add`` the arrays, put the Tensors that it answers into a message, and ``seal`` that. The arrays are
    read when the parcel is sent; until then nobody may change them.
    To read one that was received: ``array``. The arrays share the parcel's memory and are read-only.
    """

    message: M

    def __init__(self, message: M | None = None, memory: Memory | None = None) -> None:
        if message is not None:
            self.message = message
        self.memory = memory
        self.payloads: list[Array] = []  # of a parcel to send

    def add(self, array: Array) -> tensor_pb2.Tensor:
        """A Tensor for the message, in the array's place.

        Raises:
            TypeError: the dtype has no place in the contract.
        """
        tensor, payload = headed(array)
        tensor.shared_memory.offset = len(self.payloads)
        self.payloads.append(payload)
        return tensor

    def add_map(self, arrays: Mapping[str, Array]) -> dict[str, tensor_pb2.Tensor]:
        """Tensors for a ``map<string, Tensor>`` field."""
        return {name: self.add(array) for name, array in arrays.items()}

    def seal(self, message: M) -> "Parcel[M]":
        """The parcel, ready to be sent."""
        self.message = message
        return self

    def array(
        self,
        tensor: tensor_pb2.Tensor,
        field: str,
        *,
        dtypes: Collection[str] | None = None,
        shape: Sequence[int | None] | None = None,
    ) -> Array:
        """A tensor of the message that was received; arguments and errors as ``tensors.from_proto``."""
        return from_proto(tensor, field, dtypes=dtypes, shape=shape, memory=self.memory)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the arrays of a parcel to send."""
        return sum(payload.nbytes for payload in self.payloads)

    def ByteSize(self) -> int:
        """As protobuf's, to within the tags and lengths around the payloads."""
        return sum(count for _, count in self.moved())

    def moved(self) -> list[tuple[str, int]]:
        """Bytes by the way that they take: in shared memory the payloads, else the message whole."""
        if self.memory is None:
            return [("raw" if self.payloads else "protobuf", self.message.ByteSize() + self.payload_bytes)]
        if self.memory.path == "raw":
            return [("raw", self.memory.size)]
        return [("protobuf", self.message.ByteSize()), (self.memory.path, self.memory.size)]

    def to_bytes(self) -> bytes:
        """What protobuf's deterministic serialisation of the message with all its payloads would be."""
        skeleton = self.message.SerializeToString(deterministic=True)
        schema = wire.schema_of(self.message.DESCRIPTOR)
        if schema is None or not self.payloads:
            return skeleton
        return b"".join(wire.Walk(memoryview(skeleton), self._filled).pieces(schema, 0, len(skeleton)))

    def _filled(self, data: memoryview, at: int, end: int) -> wire.Pieces:
        """The tensor with its payload in the place of the reference, which is its last field."""
        start = at
        while at < end:
            field = at
            number, _, body, at = wire.read_field(data, at, end)
            if number == wire.REFERENCE:
                payload = self.payloads[wire.read_reference(data[body:at]).offset]
                return [data[start:field], wire.DATA_TAG + wire.varint(payload.nbytes), payload.data]
        return [data[start:end]]

    @classmethod
    def from_bytes(cls, kind: type[M], data: bytes) -> "Parcel[M]":
        """Read a message that may be large.

        Raises:
            DecodeError: exactly when ``kind.FromString(data)`` does.
        """
        schema = wire.schema_of(kind.DESCRIPTOR)
        if schema is not None and len(data) >= SMALL:
            try:
                pieces = wire.Walk(memoryview(data), _cut).pieces(schema, 0, len(data))
                return Parcel(kind.FromString(b"".join(pieces)), Letter(data))
            except (wire.Unusual, DecodeError):
                pass  # protobuf has the last word
        return Parcel(kind.FromString(data))


class Letter:
    """The memory of a parcel that came as one piece: the message's own bytes; ``size`` counts all of them."""

    path = "raw"

    def __init__(self, data: bytes) -> None:
        self._bytes = np.frombuffer(data, np.uint8)
        self.size = len(data)

    def read(self, where: tensor_pb2.SharedMemoryRef, field: str) -> Array:
        """The bytes that ``_cut`` took out; nobody else can have written the reference."""
        return self._bytes[where.offset : where.offset + where.length]


class Shelved:
    """The memory of a parcel that was sent in shared memory: read at the other end alone."""

    path = "shm"

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, where: tensor_pb2.SharedMemoryRef, field: str) -> Array:
        raise RuntimeError(f"{field} was sent away")


def _cut(data: memoryview, at: int, end: int) -> wire.Pieces:
    """The tensor with a reference in the place of its payload."""
    out: wire.Pieces = []
    copied, found = at, False
    while at < end:
        field = at
        number, kind, body, at = wire.read_field(data, at, end)
        if number == wire.REFERENCE or (number == wire.DATA and (found or kind != wire.BYTES)):
            raise wire.Unusual
        if number == wire.DATA:
            out += (data[copied:field], wire.reference(body, at - body))
            copied, found = at, True
    return [*out, data[copied:end]]


def tensors_of(message: Message) -> Iterator[tensor_pb2.Tensor]:
    """All Tensors of a message, however deep."""
    schema = wire.schema_of(message.DESCRIPTOR)
    if schema is None:
        return
    if schema.is_tensor:
        yield message  # type: ignore[misc]
        return
    for field, value in message.ListFields():
        if field.number not in schema.fields:
            continue
        if not field.is_repeated:
            yield from tensors_of(value)
            continue
        for one in value.values() if hasattr(value, "values") else value:
            yield from tensors_of(one)


def moved(message: Any) -> list[tuple[str, int]]:
    """As ``Parcel.moved``, for whatever is sent or received; nothing for messages without tensors."""
    if isinstance(message, Parcel):
        return message.moved()
    if isinstance(message, Message) and wire.schema_of(message.DESCRIPTOR) is not None:
        return [("protobuf", message.ByteSize())]
    return []


class ParcelChannel:
    """A channel as stubs see one, whose methods take and answer parcels; they still take plain messages."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, kind: str) -> Any:
        make = getattr(self._channel, kind)

        def method(path: str, request_serializer: Any, response_deserializer: Any, **options: Any) -> Any:
            """As ``unary_unary`` and the like; the generated stubs say of which message type they read."""
            answer = response_deserializer.__self__
            made = make(
                path,
                request_serializer=lambda sent: (
                    sent.to_bytes() if isinstance(sent, Parcel) else request_serializer(sent)
                ),
                response_deserializer=lambda data: Parcel.from_bytes(answer, data),
                **options,
            )
            made.answers_parcels = True
            return made

        return method


def takes_parcels(method: F) -> F:
    """Mark a servicer's method: its requests come as parcels."""
    method.takes_parcels = True  # type: ignore[attr-defined]
    return method
