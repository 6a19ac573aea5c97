"""Checkpoints that a client has tampered with: refused by name or gone on from, never INTERNAL, never a hang."""

import asyncio
import json
import resource
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh.v1 import tensor_pb2
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.service import create
from tests.support.mesh import LoopThread, event_loop

# Each keeps another kind of state: lists of tensors, tensors and numbers, a seed of its own, one number.
SCHEDULERS = ("DPM++ 2M Karras", "UniPC", "PNDM", "SA Solver", "Heun", "DPM++ SDE", "LMS", "Euler a")
SECONDS = 60.0  # a generation takes a hundredth of that


class Service:
    """A diffusion service on a loop of its own, and a real checkpoint of each scheduler."""

    def __init__(self, loop: LoopThread, models: Path) -> None:
        self._loop = loop
        config = DiffusionConfig(
            listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", admin_listen="127.0.0.1:0", backend="torch",
            models=str(models), threads=1,
        )  # fmt: skip
        self.server = loop.run(self._started(config))
        self.checkpoints = {name: self._checkpoint(name) for name in SCHEDULERS}
        self.plain = self.answer(a_request("Euler a"))

    async def _started(self, config: DiffusionConfig) -> Any:
        server = create(config, Lane("diffusion"))
        await server.start()
        return server

    def stop(self) -> None:
        self._loop.run(self.server.stop())

    def _checkpoint(self, scheduler: str) -> pb.SampleCheckpoint:
        told = self._loop.run(self._sample(a_request(scheduler, checkpoint_every=2)))
        return next(one.checkpoint for one in told if one.WhichOneof("event") == "checkpoint")

    def answer(self, request: pb.SampleRequest) -> bytes | grpc.aio.AioRpcError:
        """The latents' bytes, or the error."""
        try:
            last = self._loop.run(self._sample(request))[-1]
        except grpc.aio.AioRpcError as error:
            return error
        return bytes(last.result.outputs["latents"].data)

    async def _sample(self, request: pb.SampleRequest) -> list[pb.SampleResponse]:
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(self.server.address, options=options) as channel:
            call = rpc.DiffusionServiceStub(channel).Sample(request, timeout=SECONDS)
            return [response async for response in call]

    def check(self, scheduler: str, checkpoint: pb.SampleCheckpoint) -> str:
        """What became of the resumed request: "OK" or the error's text; anything but these two fails."""
        got = self.answer(a_request(scheduler, resume_from=checkpoint))
        if isinstance(got, bytes):
            return "OK"
        assert got.code() is grpc.StatusCode.INVALID_ARGUMENT, got
        assert "resume_from" in (got.details() or ""), got
        return str(got.details())


def a_request(scheduler: str, **more: Any) -> pb.SampleRequest:
    numbers = np.random.default_rng(0).normal(size=(2, 1, 5, 32)).astype(np.float32)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return pb.SampleRequest(
        model="tiny-sd", conditioning={name: to_proto(one) for name, one in zip(names, numbers, strict=True)},
        width=64, height=64, steps=5, guidance_scale=3.0, scheduler=scheduler, seeds=[5], **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def service(models: Path) -> Any:
    with event_loop() as loop:
        service = Service(loop, models)
        yield service
        service.stop()


HOSTILE_VALUES: list[Any] = [
    None, True, -1, 10**30, 1e300, float("nan"), float("inf"), "", "__class__", 4000, -4000, 0.5, [], {},
    {"list": []}, {"list": [None] * 9}, {"tuple": [1]}, {"tensor": "nowhere"}, {"tensor": [], "dtype": {}},
    {"tensor": "latents", "dtype": "float32"}, {"array": "generator.0", "dtype": "uint8"},
    {"scalar": "int32", "value": 2**40}, {"scalar": "float32", "value": 1e300}, {"scalar": "object"},
]  # fmt: skip
# The largest float32, NaN, all ones, nothing, something.
PATTERNS = [b"\xff\xff\x7f\x7f", b"\x00\x00\xc0\x7f", b"\xff" * 4, b"\x00" * 4, b"\x01" * 4]
HOSTILE_NAMES = [
    "__class__", "__dict__", "step", "config", "_internal_dict", "sigmas", "timesteps", "alphas_cumprod", "order",
    "num_inference_steps", "noise_sampler", "noise_sampler_seed", "a.b", "..", "", "é\x00", "model_outputs", "sample",
    "_step_index", "_begin_index", "lower_order_nums", "counter", "ets", "guider", "guidance_scale", "x" * 300,
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something could be put in the place of what is there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in _places(one, (*path, key)))]


def _put(root: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    inside = root
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return root


@st.composite
def _other_state(draw: st.DrawFn, checkpoint: pb.SampleCheckpoint) -> None:
    state = json.loads(checkpoint.state)
    if draw(st.booleans()):
        place = draw(st.sampled_from(_places(state)))
        state = _put(state, place, draw(st.sampled_from(HOSTILE_VALUES)))
    else:
        part = draw(st.sampled_from(["scheduler", "guider", "unet"]))
        whose = state[part] = state[part] if isinstance(state.get(part), dict) else {}  # something else may stand there
        whose[draw(st.sampled_from(HOSTILE_NAMES))] = draw(st.sampled_from(HOSTILE_VALUES))
    checkpoint.state = json.dumps(state)


@st.composite
def _other_tensor(draw: st.DrawFn, checkpoint: pb.SampleCheckpoint) -> None:
    name = draw(st.sampled_from(sorted(checkpoint.tensors)))
    tensor = checkpoint.tensors[name]
    how = draw(st.sampled_from(["gone", "dtype", "shape", "data", "fill", "huge"]))
    if how == "gone":
        del checkpoint.tensors[name]
    elif how == "dtype":
        tensor.dtype = draw(st.sampled_from(list(tensor_pb2.Dtype.values())))
    elif how == "shape":
        extents = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8, 64, 5056, 2**31, 2**62, -1]), max_size=9))
        del tensor.shape[:]
        tensor.shape.extend(extents)
    elif how == "data":
        tensor.data = draw(st.binary(max_size=2 * len(tensor.data)))
    elif how == "fill":
        pattern = draw(
            st.sampled_from([b"\xff\xff\x7f\x7f", b"\x00\x00\xc0\x7f", b"\xff" * 4, b"\x00" * 4, b"\x01" * 4])
        )
        tensor.data = (pattern * (len(tensor.data) // 4 + 1))[: len(tensor.data)]
    else:
        tensor.CopyFrom(to_proto(np.zeros(1 << 22, np.float32)))


@st.composite
def _other_bytes(draw: st.DrawFn, checkpoint: pb.SampleCheckpoint) -> None:
    data = bytearray(checkpoint.SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    del data[draw(st.integers(len(data) // 2, len(data))) :]
    try:
        checkpoint.ParseFromString(bytes(data))
    except (DecodeError, UnicodeDecodeError):
        return  # nobody can send that


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, list[Any]]:
    """A scheduler, and what is done to a checkpoint of it."""
    kinds = st.sampled_from([_other_state, _other_tensor, _other_bytes])
    return draw(st.sampled_from(SCHEDULERS)), draw(st.lists(kinds, min_size=1, max_size=2))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_checkpoint_is_refused_by_name_or_gone_on_from(service: Service, data: st.DataObject) -> None:
    scheduler, kinds = data.draw(mutated())
    checkpoint = pb.SampleCheckpoint()
    checkpoint.CopyFrom(service.checkpoints[scheduler])
    for kind in kinds:
        if checkpoint.tensors and _is_object(checkpoint.state):
            data.draw(kind(checkpoint))
    service.check(scheduler, checkpoint)


def _is_object(state: str) -> bool:
    try:
        return isinstance(json.loads(state), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_attribute_but_what_steps_change_is_set(service: Service, name: str) -> None:
    checkpoint = pb.SampleCheckpoint()
    checkpoint.CopyFrom(service.checkpoints["DPM++ 2M Karras"])
    state = json.loads(checkpoint.state)
    known = name in state["scheduler"]
    state["scheduler"][name] = {"list": []} if not known else {"tuple": []}
    checkpoint.state = json.dumps(state)
    told = service.check("DPM++ 2M Karras", checkpoint)
    # One that nothing was in yet may be set, where nobody looks at it.
    assert told == "OK" if name in ("sample", "_begin_index") else "resume_from" in told


def test_one_tensor_in_many_places_makes_no_more_of_it(service: Service) -> None:
    checkpoint = pb.SampleCheckpoint()
    checkpoint.CopyFrom(service.checkpoints["LMS"])
    checkpoint.tensors["big"].CopyFrom(to_proto(np.zeros(8192, np.float32)))
    one = {"tensor": "big", "dtype": "float32"}
    state = json.loads(checkpoint.state)
    state["scheduler"]["derivatives"] = {"list": [{"list": [one] * 400}] * 60}  # 24,000 times 32 kB
    checkpoint.state = json.dumps(state, separators=(",", ":"))
    assert len(checkpoint.state) < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "each once" in service.check("LMS", checkpoint)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


async def test_many_at_once_harm_no_neighbour(service: Service) -> None:
    """Sound requests share forwards with resumed ones whose numbers are too large for the model."""
    checkpoint = pb.SampleCheckpoint()
    checkpoint.CopyFrom(service.checkpoints["Euler a"])
    latents = np.full((1, 4, 8, 8), 3e38, np.float32)
    checkpoint.tensors["latents"].CopyFrom(to_proto(latents))
    bad = [a_request("Euler a", resume_from=checkpoint)] * 3
    answers = await asyncio.gather(
        *(asyncio.to_thread(service.answer, one) for one in (*bad, *[a_request("Euler a")] * 2))
    )
    for error in answers[:3]:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    for sound in answers[3:]:
        assert isinstance(sound, bytes)
        assert isinstance(service.plain, bytes)
        np.testing.assert_allclose(
            np.frombuffer(sound, np.float32), np.frombuffer(service.plain, np.float32), atol=1e-4
        )
