"""Protobuf's wire format, as far as it takes to move the payloads of tensors past protobuf.

A message is walked along the fields that lead to ``Tensor``s; only those are rewritten, everything else is copied as it
is. What the walk does not know, or what is rare (groups, repeated singular fields, overlong numbers), it does not guess
at: it raises ``Unusual``, and protobuf itself reads the message.

https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

from imagemesh.v1 import tensor_pb2

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
DATA: Final = tensor_pb2.Tensor.DATA_FIELD_NUMBER
REFERENCE: Final = tensor_pb2.Tensor.SHARED_MEMORY_FIELD_NUMBER
DATA_TAG: Final = bytes([DATA << 3 | BYTES])
REFERENCE_TAG: Final = bytes([REFERENCE << 3 | BYTES])
_MAX_FIELDS: Final = 10_000  # of one message, all levels together: a walk in Python must stay short
_MAX_DEPTH: Final = 16

Piece = bytes | memoryview
Pieces = list[Piece]


class Unusual(Exception):
    """The walk leaves this message to protobuf."""


@dataclass(frozen=True)
class Schema:
    """Which fields of a message type lead to tensors.

    Attributes:
        is_tensor: the type is ``Tensor`` itself.
        fields: by number, the type behind the field and whether it may occur but once.
        is_entry: the type is an entry of a map. One with an unknown field is itself kept among the unknown fields.
    """

    is_tensor: bool = False
    is_entry: bool = False
    fields: Mapping[int, tuple["Schema", bool]] = field(default_factory=dict)


_ENTRY_FIELDS: Final = 2  # the key and the value

_KNOWN: dict[str, Schema | None] = {}


def schema_of(descriptor: Any) -> Schema | None:
    """The way to the tensors of a message type; None: it holds none, or holds itself."""
    name = descriptor.full_name
    if name not in _KNOWN:
        _KNOWN[name] = None  # a type within itself counts as without tensors
        if name == tensor_pb2.Tensor.DESCRIPTOR.full_name:
            _KNOWN[name] = Schema(is_tensor=True)
        else:
            behind = {one.number: (schema_of(one.message_type), not one.is_repeated) for one in _messages(descriptor)}
            fields = {number: (schema, once) for number, (schema, once) in behind.items() if schema is not None}
            is_entry = descriptor.GetOptions().map_entry
            _KNOWN[name] = Schema(fields=fields, is_entry=is_entry) if fields else None
    return _KNOWN[name]


def _messages(descriptor: Any) -> list[FieldDescriptor]:
    return [one for one in descriptor.fields if one.message_type is not None]


def varint(number: int) -> bytes:
    """A base-128 number."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends.

    Raises:
        Unusual: it is cut off, or longer than the tags and lengths that are written.
    """
    value = shift = 0
    while at < end and shift < 35:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Unusual


# Told the range of a Tensor in the message, answers what to write in its place.
TensorRewriter = Callable[[memoryview, int, int], Pieces]


class Walk:
    """One walk over one message."""

    def __init__(self, data: memoryview, rewrite: TensorRewriter) -> None:
        self._data = data
        self._rewrite = rewrite
        self._left = _MAX_FIELDS

    def pieces(self, schema: Schema, at: int, end: int, depth: int = 0) -> Pieces:
        """The message of ``data[at:end]`` with its tensors rewritten; joined, they are the new message.

        Raises:
            Unusual: see the module.
        """
        if schema.is_tensor:
            return self._rewrite(self._data, at, end)
        if depth > _MAX_DEPTH:
            raise Unusual
        out: Pieces = []
        copied, seen = at, set()
        while at < end:
            start = at
            number, kind, body, at = self.field(at, end)
            if schema.is_entry and (number > _ENTRY_FIELDS or kind != BYTES):  # our maps' keys are strings
                raise Unusual
            if number not in schema.fields:
                continue
            behind, once = schema.fields[number]
            if kind != BYTES or (once and number in seen):
                raise Unusual
            seen.add(number)
            inner = self.pieces(behind, body, at, depth + 1)
            head = varint(number << 3 | BYTES) + varint(sum(len(piece) for piece in inner))
            out += (self._data[copied:start], head, *inner)
            copied = at
        out.append(self._data[copied:end])
        return out

    def field(self, at: int, end: int) -> tuple[int, int, int, int]:
        """Number, wire type, where the content begins and where it ends."""
        self._left -= 1
        if self._left < 0:
            raise Unusual
        return read_field(self._data, at, end)


def read_field(data: memoryview, at: int, end: int) -> tuple[int, int, int, int]:
    """Number, wire type, where the content begins and where it ends.

    Raises:
        Unusual: it is cut off, a group, or numbered as no field is.
    """
    tag, body = read_varint(data, at, end)
    kind = tag & 7
    if kind == VARINT:
        after = body + 1
        while after <= min(end, body + 10) and data[after - 1] > 0x7F:
            after += 1
        if after > body + 10:
            raise Unusual
    elif kind == BYTES:
        length, body = read_varint(data, body, end)
        after = body + length
    elif kind in (FIXED32, FIXED64):
        after = body + (4 if kind == FIXED32 else 8)
    else:
        raise Unusual
    if after > end or not 0 < tag >> 3 < 1 << 29:
        raise Unusual
    return tag >> 3, kind, body, after


def reference(offset: int, length: int) -> bytes:
    """A Tensor's ``shared_memory`` field, both numbers written also where they are 0."""
    inner = b"\x08" + varint(offset) + b"\x10" + varint(length)
    return REFERENCE_TAG + varint(len(inner)) + inner


def read_reference(content: Any) -> tensor_pb2.SharedMemoryRef:
    """The content of a ``shared_memory`` field."""
    return tensor_pb2.SharedMemoryRef.FromString(bytes(content))
