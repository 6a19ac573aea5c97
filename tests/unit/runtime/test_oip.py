"""The Open Inference Protocol's face without a server: what a client may ask of tensors, outputs and memory."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from imagemesh.v1 import vit_service_pb2
from imagemesh_runtime.context import CallContext
from imagemesh_runtime.errors import InvalidArgument, MeshError, PermissionDenied
from imagemesh_runtime.interceptors import Call, context_layer
from imagemesh_runtime.oip import FULL_NAME, InferenceServicer
from imagemesh_runtime.oip_memory import Regions
from imagemesh_runtime.oip_messages import Reader, strings
from imagemesh_runtime.oip_models import Arrays, OipModel, Parameters, TensorSpec
from imagemesh_runtime.oip_stages import vit_models

NEAR, FAR = SimpleNamespace(peer=lambda: "unix:"), SimpleNamespace(peer=lambda: "ipv4:10.0.0.7:99")
IMAGE = TensorSpec("image", "UINT8", (-1, -1, 3))


class Work:
    """A model that counts what it is asked, and answers its input."""

    def __init__(self, labels: Sequence[str] | None = None) -> None:
        self.calls = 0
        self._names = labels or ()
        tells = "names" if labels is not None else ""
        self.model = OipModel("echo", [IMAGE], [IMAGE], self._infer, max_batch=4, labels=tells)
        self.servicer = InferenceServicer("test", [self.model], lambda: True, 60)

    async def _infer(self, arrays: Arrays, parameters: Parameters) -> Arrays:
        self.calls += 1
        return {"image": arrays["image"], "names": strings(self._names)}


def asked(shape: Sequence[int], data: bytes, classes: int | None = None, name: str = "echo") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=name, raw_input_contents=[data])
    request.inputs.add(name="image", datatype="UINT8", shape=shape)
    if classes is not None:
        request.outputs.add(name="image").parameters["classification"].int64_param = classes
    return request


async def test_a_model_without_labels_is_not_asked_for_classes() -> None:
    work = Work()
    with pytest.raises(InvalidArgument, match="has no classes"):
        await work.servicer.ModelInfer(asked([1, 1, 1, 3], b"abc", 2**31), NEAR)
    assert work.calls == 0


@pytest.mark.parametrize("classes", [1001, 2**31, -1])
async def test_the_number_of_classes_is_bounded_before_the_work(classes: int) -> None:
    work = Work(["a", "b", "c"])
    with pytest.raises(InvalidArgument, match="must be 0 to 1000"):
        await work.servicer.ModelInfer(asked([1, 1, 1, 3], b"abc", classes), NEAR)
    assert work.calls == 0


async def test_classes_are_told_with_their_labels() -> None:
    answer = await Work(["a", "b", "c"]).servicer.ModelInfer(asked([1, 1, 1, 3], b"\x05\x09\x01", 2), NEAR)
    (raw,) = answer.raw_output_contents
    assert raw == b"\x0c\0\0\x009.000000:1:b\x0c\0\0\x005.000000:0:a"


async def test_labels_are_those_of_the_requests_own_answer_whatever_is_asked_meanwhile() -> None:
    async def name(asked: str) -> str:
        return asked

    async def classify(request: vit_service_pb2.ClassifyImagesRequest) -> vit_service_pb2.ClassifyImagesResponse:
        told = vit_service_pb2.Prediction(label=f"{request.model}'s", logit=1)
        return vit_service_pb2.ClassifyImagesResponse(
            classifications=[vit_service_pb2.Classification(predictions=[told])]
        )

    unused: Any = None
    vit = vit_models(name, classify, unused)[0]
    request = asked([1, 1, 1, 3], b"abc", name="vit")
    request.outputs.add(name="logits").parameters["classification"].int64_param = 1
    reader = Reader(vit, request, Regions(), NEAR.peer())
    assert vit.infer is not None
    mine, _ = [await vit.infer(reader.inputs(), {"model": model}) for model in ("mine", "other")]
    answer = await reader.response(mine)
    assert answer.raw_output_contents[0].endswith(b"1.000000:0:mine's")


@pytest.mark.parametrize("shape", [[1, 0, 2**63 - 1, 3], [1, 2**62, 0, 3], [1, 2**63 - 1, 2**63 - 1, 3]])
async def test_shapes_that_no_memory_holds_are_refused_by_name(shape: list[int]) -> None:
    with pytest.raises(InvalidArgument, match=r"shape.* must be of a size that fits in memory"):
        await Work().servicer.ModelInfer(asked(shape, b""), NEAR)


@pytest.fixture
def segment() -> Iterator[Path]:
    path = Path(f"/dev/shm/imagemesh_unit_{os.getpid()}")
    path.write_bytes(bytes(range(96)) * 1024)
    yield path
    path.unlink()


def test_a_segment_that_its_client_cuts_short_harms_nobody(segment: Path) -> None:
    regions = Regions()
    regions.register("r", f"/{segment.name}", 96, 4096 * 10)
    region = regions.get("r")
    assert region.read(1, 3) == b"\x01\x02\x03"
    region.write(1, b"new")
    assert segment.read_bytes()[97:100] == b"new"
    os.truncate(segment, 98)
    for use in (lambda: region.read(0, 4096 * 10), lambda: region.write(1, b"new")):
        with pytest.raises(InvalidArgument, match="has been cut short"):
            use()
    assert segment.stat().st_size == 98
    regions.unregister("")


def test_a_segment_larger_than_memory_is_not_read(segment: Path) -> None:
    os.truncate(segment, 1 << 40)
    regions = Regions()
    regions.register("r", segment.name, 0, 1 << 40)
    with pytest.raises(InvalidArgument, match="at most"):
        regions.get("r").read(0, 1 << 40)
    regions.unregister("r")


def test_a_pipe_is_no_segment(segment: Path) -> None:
    pipe = segment.with_suffix(".pipe")
    os.mkfifo(pipe)
    try:
        with pytest.raises(MeshError, match=r"can't be opened|is none"):
            Regions().register("r", pipe.name, 0, 8)
    finally:
        pipe.unlink()


async def test_only_clients_of_this_machine_hear_of_its_regions() -> None:
    with pytest.raises(PermissionDenied):
        await Work().servicer.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(), FAR)
    await Work().servicer.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(), NEAR)


class Decoupled:
    """A model that says "image" once and then does what it is told, and notes when it is closed."""

    def __init__(self, then: Callable[[], Awaitable[None]], seconds: float = 60) -> None:
        self._then = then
        self.closed = asyncio.Event()
        models = [OipModel("slow", [IMAGE], [IMAGE], stream=self._stream), Work().model]
        self.servicer = InferenceServicer("test", models, lambda: True, seconds)

    async def _stream(self, arrays: Arrays, parameters: Parameters) -> AsyncGenerator[tuple[Arrays, bool], None]:
        try:
            yield {"image": arrays["image"]}, False
            await self._then()
        finally:
            self.closed.set()


async def both() -> AsyncIterator[pb.ModelInferRequest]:
    """One request that fails, and one that does not."""
    request = asked([1, 1, 3], b"abc", name="slow")
    request.id = "1"
    yield request
    request = asked([1, 1, 1, 3], b"abc")
    request.id = "2"
    yield request


async def fails() -> None:
    raise ZeroDivisionError("unforeseen")


async def hangs() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("then", "seconds", "told"), [(fails, 60, "internal error"), (hangs, 0.2, "did not answer within 0.2 s")]
)
async def test_a_request_that_fails_ends_itself_and_not_the_stream(
    then: Any, seconds: float, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Decoupled(then, seconds)
    got = [one async for one in model.servicer.ModelStreamInfer(both(), NEAR)]
    assert [one.infer_response.id for one in got] == ["1", "1", "2"]
    assert [told in one.error_message for one in got] == [False, True, False]
    assert model.closed.is_set()
    assert ("ZeroDivisionError: unforeseen" in caplog.text) is (then is fails)


async def test_a_stream_may_be_idle_for_longer_than_a_request_may_take() -> None:
    model = Decoupled(hangs, 0.05)

    async def idle() -> AsyncIterator[pb.ModelInferRequest]:
        yield asked([1, 1, 1, 3], b"abc")
        await asyncio.sleep(0.1)  # what is promised is that this does no harm
        yield asked([1, 1, 1, 3], b"abc")

    got = [one.error_message async for one in model.servicer.ModelStreamInfer(idle(), NEAR)]
    assert got == ["", ""]


async def test_closing_a_stream_closes_the_work_below_it() -> None:
    model = Decoupled(hangs)
    stream = model.servicer.ModelStreamInfer(both(), NEAR)
    await anext(stream)
    await stream.aclose()
    assert model.closed.is_set()


async def test_the_server_gives_streams_of_requests_no_deadline_of_their_own() -> None:
    async def deadline(service: str, method: str) -> float | None:
        context = SimpleNamespace(
            time_remaining=lambda: None, trailing_metadata=tuple, set_trailing_metadata=lambda _: None
        )
        call = Call("", service, method, {}, context, CallContext())
        async with context_layer(600)(call):
            return call.context_call.deadline

    assert await deadline(FULL_NAME, "ModelStreamInfer") is None
    assert await deadline(FULL_NAME, "ModelInfer") is not None
