"""Whatever a client of the Open Inference Protocol sends, the server's answer is no INTERNAL."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from imagemesh_cli.host import MeshHost
from tests.support.mesh import running_mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshHost]:
    with running_mesh(backend="fake") as host:
        yield host


@pytest.fixture(scope="module", params=["gateway", "vit"])
def stub(mesh: MeshHost, request: pytest.FixtureRequest) -> Iterator[rpc.GRPCInferenceServiceStub]:
    address = mesh.grpc_address if request.param == "gateway" else mesh.services[request.param].address
    with grpc.insecure_channel(address) as channel:
        yield rpc.GRPCInferenceServiceStub(channel)


NAMES = st.sampled_from(["vit", "vit_embedding", "vae_encoder", "vae_decoder", "text_encoder", "generate", "", "x"])
TENSORS = st.sampled_from(
    ["image", "latents", "prompt", "negative_prompt", "steps", "seed", "guidance", "logits", "x", ""]
)
TYPES = st.sampled_from(["UINT8", "FP32", "FP16", "BYTES", "INT64", "INT32", "BOOL", "X", ""])
SIDES = st.one_of(st.sampled_from([0, 1, 2, 3, 8, 64]), st.integers(-(2**63), 2**63 - 1))
PARAMETERS = st.dictionaries(
    st.sampled_from(
        [
            "classification",
            "shared_memory_region",
            "shared_memory_byte_size",
            "shared_memory_offset",
            "model",
            "literal",
            "x",
        ]
    ),
    st.one_of(
        st.builds(lambda value: pb.InferParameter(int64_param=value), st.integers(-(2**63), 2**63 - 1)),
        st.builds(lambda value: pb.InferParameter(string_param=value), st.sampled_from(["", "fake", "../x", "\0"])),
        st.builds(lambda value: pb.InferParameter(bool_param=value), st.booleans()),
        st.builds(lambda value: pb.InferParameter(double_param=value), st.floats()),
        st.just(pb.InferParameter()),
    ),
    max_size=3,
)
RAW = st.one_of(st.binary(max_size=16), st.sampled_from([b"\0" * 3, b"\0" * 192, b"\2\0\0\0hi", b"\1\0\0\0\xff"]))


@st.composite
def requests(draw: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(
        model_name=draw(NAMES), model_version=draw(st.sampled_from(["", "1", "2", "x"])), id=draw(st.text(max_size=5))
    )
    for _ in range(draw(st.integers(0, 3))):
        one = request.inputs.add(name=draw(TENSORS), datatype=draw(TYPES), shape=draw(st.lists(SIDES, max_size=4)))
        _fill(one.parameters, draw(PARAMETERS))
        if draw(st.booleans()):
            one.contents.uint_contents.extend(draw(st.lists(st.integers(0, 2**32 - 1), max_size=4)))
            one.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=4), max_size=2)))
            one.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32), max_size=4)))
    for _ in range(draw(st.integers(0, 2))):
        _fill(request.outputs.add(name=draw(TENSORS)).parameters, draw(PARAMETERS))
    _fill(request.parameters, draw(PARAMETERS))
    request.raw_input_contents.extend(draw(st.lists(RAW, max_size=3)))
    return request


def _fill(place: Any, parameters: dict[str, pb.InferParameter]) -> None:
    for name, value in parameters.items():
        place[name].CopyFrom(value)


def code(call: Any) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FUZZ
@given(request=requests())
def test_an_inference_is_never_an_internal_error(stub: rpc.GRPCInferenceServiceStub, request: Any) -> None:
    assert code(lambda: stub.ModelInfer(request, timeout=30)) is not grpc.StatusCode.INTERNAL
    streamed = request.model_name != "generate"  # which would draw
    assert code(lambda: list(stub.ModelStreamInfer(iter([request]), timeout=30)) if streamed else None) is (
        grpc.StatusCode.OK
    )


PICTURE = pb.ModelInferRequest(model_name="vit", raw_input_contents=[b"\0" * 3])
PICTURE.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 1, 3])


@FUZZ
@given(
    outputs=st.lists(st.tuples(st.sampled_from(["logits", "probabilities", "x"]), PARAMETERS), max_size=3),
    parameters=PARAMETERS,
)
def test_whatever_is_wanted_of_a_good_request(
    stub: rpc.GRPCInferenceServiceStub, outputs: Any, parameters: Any
) -> None:
    request = pb.ModelInferRequest()
    request.CopyFrom(PICTURE)
    _fill(request.parameters, parameters)
    for name, told in outputs:
        _fill(request.outputs.add(name=name).parameters, told)
    assert code(lambda: stub.ModelInfer(request, timeout=30)) is not grpc.StatusCode.INTERNAL


@FUZZ
@given(name=st.text(max_size=8), key=st.text(max_size=8), offset=st.integers(0, 2**64 - 1))
def test_a_region_is_refused_or_is_none(stub: rpc.GRPCInferenceServiceStub, name: str, key: str, offset: int) -> None:
    request = pb.SystemSharedMemoryRegisterRequest(name=name, key=f"imagemesh none {key}", offset=offset, byte_size=1)
    assert code(lambda: stub.SystemSharedMemoryRegister(request)) is grpc.StatusCode.INVALID_ARGUMENT
    for call, message in (
        (stub.ModelReady, pb.ModelReadyRequest(name=name, version=key)),
        (stub.ModelMetadata, pb.ModelMetadataRequest(name=name, version=key)),
        (stub.ModelConfig, pb.ModelConfigRequest(name=name, version=key)),
        (stub.ModelStatistics, pb.ModelStatisticsRequest(name=name, version=key)),
        (stub.SystemSharedMemoryStatus, pb.SystemSharedMemoryStatusRequest(name=name)),
        (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name=f"x{name}")),
    ):
        assert code(lambda call=call, message=message: call(message)) is not grpc.StatusCode.INTERNAL
