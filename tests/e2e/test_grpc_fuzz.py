"""Whatever message any method of the gateway is sent, its answer is no INTERNAL."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagemesh.v1 import (
    gateway_service_pb2,
    image_pb2,
    job_service_pb2,
    model_loading_service_pb2,
    preprocess_service_pb2,
    search_service_pb2,
)
from tests.support.keys import key_file
from tests.support.mesh import running_mesh
from tests.support.recording_gateway import png

FILES = (gateway_service_pb2, job_service_pb2, model_loading_service_pb2, preprocess_service_pb2, search_service_pb2)
METHODS = [
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
]
DEPTH = 4
SEEN = [image_pb2.Image(encoded=png(7))]
SMALL = gateway_service_pb2.GenerateRequest(prompt="a cat", steps=1, width=8, height=8)
# What is good as it is, for half of the messages to begin with.
GOOD: dict[str, Any] = {
    type(one).DESCRIPTOR.name: one
    for one in (
        SMALL,
        gateway_service_pb2.ClassifyRequest(images=SEEN),
        gateway_service_pb2.EmbedRequest(images=SEEN),
        job_service_pb2.CreateJobRequest(generate=SMALL),
        preprocess_service_pb2.PreprocessRequest(preprocessor="canny", image=SEEN[0]),
        search_service_pb2.IndexImagesRequest(index="a", images=SEEN, ids=["x"]),
        search_service_pb2.SearchImagesRequest(index="a", images=SEEN),
        search_service_pb2.FindDuplicatesRequest(index="a", min_similarity=0.5),
        search_service_pb2.RemoveImagesRequest(index="a", ids=["x"]),
        search_service_pb2.ExportVectorsRequest(index="a"),
        search_service_pb2.ClusterImagesRequest(index="a"),
    )
}
BITS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1), FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1), FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}  # fmt: skip
WORDS = st.sampled_from(["", "fake", "a cat", "Euler a", "canny", "CFG", "../x", "\0", "(((", "{", "null", "1e999"])
PICTURES = st.sampled_from([png(7), png(0)[:40], b"", b"\x89PNG", b"\xff\xd8\xff\xe0", b"\0" * 192])


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """Of one field: what may be meant, what can't be, and the ends of its type."""
    if field.type in BITS:
        low, high = BITS[field.type]
        return st.one_of(st.sampled_from([0, 1, 2, 8, 64, low, high]), st.integers(low, high))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return st.sampled_from([*(one.number for one in field.enum_type.values), 99, -1])
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return messages(field.message_type, depth - 1)
    kinds = {
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_BYTES: PICTURES,
        FieldDescriptor.TYPE_STRING: st.one_of(WORDS, st.text(max_size=8)),
        FieldDescriptor.TYPE_FLOAT: st.one_of(st.sampled_from([0.0, 0.5, 1.0, -1.0]), st.floats(width=32)),
        FieldDescriptor.TYPE_DOUBLE: st.one_of(st.sampled_from([0.0, 0.5, 1.0, -1.0]), st.floats()),
    }
    return kinds[field.type]


@st.composite
def messages(draw: Any, descriptor: Descriptor, depth: int = DEPTH) -> Any:
    """A message of that type, of which some fields are set."""
    made = GetMessageClass(descriptor)()
    if descriptor.name in GOOD and draw(st.booleans()):
        made.CopyFrom(GOOD[descriptor.name])
    fields = [one for one in descriptor.fields if depth or one.type != FieldDescriptor.TYPE_MESSAGE]
    for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=id)) if fields else ():
        place = getattr(made, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            for name in draw(st.lists(WORDS, max_size=2)):
                if value.type == FieldDescriptor.TYPE_MESSAGE:
                    place[name].CopyFrom(draw(values(value, depth)))
                else:
                    place[name] = draw(values(value, depth))
        elif field.is_repeated:
            place.extend(draw(st.lists(values(field, depth), max_size=3)))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            place.CopyFrom(draw(values(field, depth)))
        else:
            setattr(made, field.name, draw(values(field, depth)))
    return made


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What comes of a call: its code, and what is told. A key bounds what is drawn."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    token = key_file(keys, admin={"role": "admin", "pixel_steps_per_day": 64 * 64 * 200})["admin"]
    with (
        running_mesh({"keys_file": str(keys), "drain_grace_seconds": "1"}, backend="fake") as host,
        grpc.insecure_channel(host.grpc_address) as channel,
    ):

        def call(method: MethodDescriptor, asked: list[Any]) -> tuple[grpc.StatusCode, str]:
            streams = (method.client_streaming, method.server_streaming)
            kind = "_".join("stream" if one else "unary" for one in streams)
            rpc = getattr(channel, kind)(
                f"/{method.containing_service.full_name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            given = iter(asked) if method.client_streaming else asked[0]
            try:
                answer = rpc(given, timeout=30, metadata=(("authorization", f"Bearer {token}"),))
                told = list(answer) if method.server_streaming else [answer]
            except grpc.RpcError as error:
                return error.code(), str(error.details())
            errors = [one.error for one in told if method.client_streaming and one.HasField("error")]
            return grpc.StatusCode.OK, " ".join(error.message for error in errors)

        yield call


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_message_is_an_internal_error(call: Any, method: MethodDescriptor) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(asked=st.lists(messages(method.input_type), min_size=1, max_size=3 if method.client_streaming else 1))
    def run(asked: list[Any]) -> None:
        code, told = call(method, asked)
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), told
        assert "internal error" not in told

    run()
