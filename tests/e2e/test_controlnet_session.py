"""The ControlNet service's conversation, over a real channel: what it answers, what it refuses, when it lets go."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc.aio import EOF, AioRpcError

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh.v1 import tensor_pb2
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.controlnet.backend import BACKENDS, ControlInputs, whole
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.service import create
from tests.support.backends import load_first
from tests.support.echo import status_of
from tests.support.services import serving

SESSIONS = 2
NAMES = {"torch": "tiny-controlnet", "onnxruntime": "tiny-controlnet", "openvino": "tiny-controlnet", "fake": "fake"}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
EMBEDDINGS = np.random.default_rng(1).normal(size=(2, 5, 32)).astype(np.float32)
SAMPLE = np.random.default_rng(2).normal(size=(2, 4, 8, 8)).astype(np.float32)
NAN = np.full_like(SAMPLE, np.nan)


class Service:
    """The service, served, and what to say to it."""

    def __init__(self, backend: str, models: Path, stub: rpc.ControlNetServiceStub) -> None:
        self.backend = backend
        self.models = models
        self._stub = stub

    def start(self, **changes: Any) -> pb.ControlRequest:
        """A start that is right but for the changes."""
        unit = {"model": NAMES[self.backend], "image": to_proto(PICTURE), "scale": 1.0}
        right = {"units": [self.unit(**{name: changes.pop(name) for name in unit if name in changes})]}
        right["encoder_hidden_states"] = to_proto(EMBEDDINGS)
        return pb.ControlRequest(start=pb.ControlStart(**{**right, **changes}))

    def unit(self, **changes: Any) -> pb.ControlNetUnit:
        """A unit that is right but for the changes."""
        right = {"model": NAMES[self.backend], "image": to_proto(PICTURE), "scale": 1.0}
        return pb.ControlNetUnit(**{**right, **changes})

    def talk(self) -> Any:
        """A new session: write and read."""
        return self._stub.Control()

    async def open(self) -> Any:
        """A session that has been answered: it holds its place."""
        call = self.talk()
        await call.write(self.start())
        await call.write(step())
        assert (await call.read()).backend == self.backend
        return call

    async def refusal(self, requests: Iterable[pb.ControlRequest]) -> AioRpcError:
        """The error that a session ends with when it is told all this; the service then still does its work."""
        with pytest.raises(AioRpcError) as caught:
            async for _ in self._stub.Control(iter(requests)):
                pass
        (await self.open()).cancel()
        return caught.value

    async def reopened(self) -> Any:
        """A session, as soon as there is place for one."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await self.open()
                except (AioRpcError, asyncio.InvalidStateError):  # no place yet; told at a read or a write
                    continue


def step(sample: np.ndarray = SAMPLE, timestep: float = 601.0) -> pb.ControlRequest:
    return pb.ControlRequest(step=pb.ControlStep(sample=to_proto(sample), timestep=timestep))


def told(embeddings: np.ndarray, **added: np.ndarray) -> pb.ControlRequest:
    """A step that tells of other prompts."""
    request = step()
    request.step.encoder_hidden_states.CopyFrom(to_proto(embeddings))
    for name, array in added.items():
        request.step.added_conditions[name].CopyFrom(to_proto(array))
    return request


@pytest.fixture(params=["torch", "fake"])
async def service(request: pytest.FixtureRequest, models: Path) -> AsyncIterator[Service]:
    config = ControlNetConfig(
        listen="127.0.0.1:0", backend=request.param, models=str(models), device="cpu", threads=2, max_queue=SESSIONS,
        drain_grace_seconds=0.1,
    )  # fmt: skip
    async with serving(create, config) as served:
        yield Service(request.param, models, rpc.ControlNetServiceStub(served.channel))


def field_of(error: AioRpcError) -> str:
    """The field that the error's BadRequest names."""
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    assert status_of(error).details[0].Unpack(bad)
    return bad.field_violations[0].field


@pytest.mark.parametrize("service", BACKENDS, indirect=True)
async def test_every_step_is_answered_with_the_backends_residuals(service: Service):
    model = load_first(BACKENDS, service.backend, ControlNetConfig, service.models)
    run = model.start(ControlInputs(PICTURE, EMBEDDINGS, 1.0))
    call = service.talk()
    await call.write(service.start())
    for timestep in (981.0, 481.0, 1.0):
        await call.write(step(SAMPLE, timestep))
        answer = await call.read()
        part = whole(run, SAMPLE, timestep)
        said = [from_proto(one, "residual") for one in (*answer.down_residuals, answer.mid_residual)]
        for one, other in zip(said, [*part.down, part.mid], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        assert answer.backend == service.backend
    await call.done_writing()
    assert await call.read() == EOF
    assert await call.code() == grpc.StatusCode.OK


async def test_a_session_without_a_word_ends_well(service: Service):
    call = service.talk()
    await call.done_writing()
    assert await call.read() == EOF
    assert await call.code() == grpc.StatusCode.OK


async def test_sessions_side_by_side_keep_to_their_own_pictures(service: Service):
    calls = []
    for picture in (PICTURE, PICTURE // 4):
        calls.append(service.talk())
        await calls[-1].write(service.start(image=to_proto(picture)))
    answers = []
    for call in (*calls, calls[0]):
        await call.write(step())
        answers.append(from_proto((await call.read()).mid_residual, "mid"))
    np.testing.assert_array_equal(answers[2], answers[0])
    assert np.abs(answers[1] - answers[0]).max() > 1e-2


async def test_a_step_before_the_start_is_refused(service: Service):
    error = await service.refusal([step()])
    assert field_of(error) == "message"
    assert "start before the first step" in error.details()


async def test_a_second_start_is_refused(service: Service):
    error = await service.refusal([service.start(), service.start()])
    assert field_of(error) == "message"
    assert "start once" in error.details()


async def test_a_message_that_says_nothing_is_refused(service: Service):
    assert field_of(await service.refusal([pb.ControlRequest()])) == "message"


async def test_an_unknown_model_is_not_found_and_the_error_says_what_there_is(service: Service):
    error = await service.refusal([service.start(model="canny")])
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details() == f"model 'canny' not found; available: {NAMES[service.backend]}"


BAD_STARTS = {
    "scale below 0": ({"scale": -0.01}, "start.units[0].scale"),
    "scale above 10": ({"scale": 10.01}, "start.units[0].scale"),
    "scale of NaN": ({"scale": float("nan")}, "start.units[0].scale"),
    "no image": ({"image": tensor_pb2.Tensor()}, "start.units[0].image.dtype"),
    "image of floats": ({"image": to_proto(PICTURE.astype(np.float32))}, "start.units[0].image.dtype"),
    "image without rank": ({"image": to_proto(PICTURE[0])}, "start.units[0].image.shape"),
    "image with alpha": ({"image": to_proto(np.zeros((64, 64, 4), np.uint8))}, "start.units[0].image.shape"),
    "image of odd height": ({"image": to_proto(PICTURE[:60])}, "start.units[0].image.shape[0]"),
    "image of no width": ({"image": to_proto(PICTURE[:, :0])}, "start.units[0].image.shape[1]"),
    "image cut short": (
        {"image": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_UINT8, shape=[64, 64, 3], data=b"123")},
        "start.units[0].image.data",
    ),
    "embeddings of integers": (
        {"encoder_hidden_states": to_proto(EMBEDDINGS.astype(np.int32))},
        "start.encoder_hidden_states.dtype",
    ),
    "embeddings of rank 2": ({"encoder_hidden_states": to_proto(EMBEDDINGS[0])}, "start.encoder_hidden_states.shape"),
    "embeddings of NaN": (
        {"encoder_hidden_states": to_proto(np.full_like(EMBEDDINGS, np.nan))},
        "start.encoder_hidden_states",
    ),
    "no rows": ({"encoder_hidden_states": to_proto(EMBEDDINGS[:0])}, "start.encoder_hidden_states.shape[0]"),
    "too many rows": (
        {"encoder_hidden_states": to_proto(np.zeros((129, 1, 32), np.float32))},
        "start.encoder_hidden_states.shape[0]",
    ),
    "too many pixels": (
        {
            "encoder_hidden_states": to_proto(np.zeros((128, 1, 32), np.float32)),
            "image": to_proto(np.zeros((1024, 1032, 3), np.uint8)),
        },
        "start.encoder_hidden_states",
    ),
}


@pytest.mark.parametrize(("changes", "field"), BAD_STARTS.values(), ids=BAD_STARTS)
async def test_a_start_that_cannot_be_is_refused_by_the_fields_name(service: Service, changes: Any, field: str):
    assert field_of(await service.refusal([service.start(**changes)])) == field


BAD_STEPS = {
    "NaN": (step(NAN), "step.sample"),
    "infinity": (step(np.full_like(SAMPLE, np.inf)), "step.sample"),
    "integers": (step(SAMPLE.astype(np.int32)), "step.sample.dtype"),
    "rank 3": (step(SAMPLE[0]), "step.sample.shape"),
    "nothing": (pb.ControlRequest(step=pb.ControlStep()), "step.sample.dtype"),
    "timestep of NaN": (step(SAMPLE, float("nan")), "step.timestep"),
    "timestep of infinity": (step(SAMPLE, float("inf")), "step.timestep"),
    "other prompts of NaN": (told(np.full_like(EMBEDDINGS, np.nan)), "step.encoder_hidden_states"),
    "other prompts of other shape": (told(EMBEDDINGS[:, :4]), "step.encoder_hidden_states.shape"),
    "conditions that the start had not": (told(EMBEDDINGS, text_embeds=EMBEDDINGS[:, 0]), "step.added_conditions"),
}


@pytest.mark.parametrize(("bad", "field"), BAD_STEPS.values(), ids=BAD_STEPS)
async def test_a_step_that_cannot_be_is_refused_by_the_fields_name(
    service: Service, bad: pb.ControlRequest, field: str
):
    assert field_of(await service.refusal([service.start(), bad])) == field


@pytest.mark.parametrize("service", ["torch"], indirect=True)
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 3, 8, 8), (2, 4, 8, 16)])
async def test_rows_that_do_not_fit_the_start_are_refused(service: Service, shape: tuple[int, ...]):
    error = await service.refusal([service.start(), step(np.zeros(shape, np.float32))])
    assert field_of(error) == "step.sample.shape"


@pytest.mark.parametrize("service", ["torch"], indirect=True)
async def test_embeddings_of_another_width_are_refused(service: Service):
    wide = to_proto(np.zeros((2, 5, 48), np.float32))
    error = await service.refusal([service.start(encoder_hidden_states=wide)])
    assert field_of(error) == "start.encoder_hidden_states"


async def test_one_session_too_many_is_sent_away_with_a_time_to_come_back(service: Service):
    held = [await service.open() for _ in range(SESSIONS)]
    with pytest.raises(AioRpcError) as caught:
        await service.talk().read()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    retry = error_details_pb2.RetryInfo()
    assert status_of(caught.value).details[0].Unpack(retry)
    assert retry.retry_delay.seconds == 1
    for call in held:  # those who hold a place don't notice
        await call.write(step())
        assert (await call.read()).backend == service.backend


@pytest.mark.parametrize("way", ["cancelled", "ended", "refused"])
async def test_a_session_that_is_over_makes_place(service: Service, way: str):
    first, second = [await service.open() for _ in range(SESSIONS)]
    if way == "cancelled":
        first.cancel()
    elif way == "ended":
        await first.done_writing()
        assert await first.code() == grpc.StatusCode.OK
    else:
        await first.write(service.start())
        assert await first.code() == grpc.StatusCode.INVALID_ARGUMENT
    third = await service.reopened()
    for call in (second, third):
        await call.write(step())
        assert (await call.read()).backend == service.backend
