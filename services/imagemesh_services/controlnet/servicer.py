"""Requests to arrays and back."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import InvalidArgument, Overloaded
from imagemesh_runtime.limits import (
    MAX_CONTROL_SCALE,
    MAX_CONTROLS,
    MAX_IMAGES,
    MAX_TOKENS,
    check_block_weights,
    check_pixels,
    check_range,
    check_size,
)
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel, takes_parcels
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.savings import check_rounding, rounded
from imagemesh_runtime.tensors import FLOATS, Array, from_proto, require_finite, to_proto
from imagemesh_services.controlnet.backend import ControlModel, Emit, Loaded, Part, PictureAdapter
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.session import Session, Unit

# What some families add to the prompts' embeddings, by diffusers' names.
ADDED = ("text_embeds", "time_ids")

Request = Parcel[pb.ControlRequest]
Response = Parcel[pb.ControlResponse]


class _Gone(Exception):
    """Nobody listens to the step any more."""


class ControlNetServicer(rpc.ControlNetServiceServicer):
    """A session a generation: what stays the same once, then residuals for every evaluation."""

    def __init__(self, config: ControlNetConfig, models: LoadedModels[Loaded], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._max_sessions = config.max_queue
        self._sessions = 0
        self._pending = 0  # pictures to adapt, each of one call

    @takes_parcels
    async def Control(  # type: ignore[override]
        self, request_iterator: AsyncIterator[Request], context: Any
    ) -> AsyncIterator[Response]:
        if self._sessions >= self._max_sessions:
            raise Overloaded("controlnet", self._max_sessions, 1.0)
        self._sessions += 1
        try:
            with self._metrics.running.track_inprogress():
                session, start = None, pb.ControlStart()
                async for request in request_iterator:
                    if request.message.WhichOneof("message") == "step":
                        async with aclosing(self._answers(session, start, request)) as answers:
                            async for answer in answers:
                                yield answer
                    else:
                        session, start = await self._start(session, request), request.message.start
        finally:
            self._sessions -= 1

    async def AdaptPicture(self, request: pb.AdaptPictureRequest, context: Any) -> pb.AdaptPictureResponse:
        if self._pending >= self._max_sessions:
            raise Overloaded("adapt", self._max_sessions, 1.0)
        self._pending += 1
        try:
            return await self._adapt(request)
        finally:
            self._pending -= 1

    async def _adapt(self, request: pb.AdaptPictureRequest) -> pb.AdaptPictureResponse:
        image = from_proto(request.image, "image", dtypes=["uint8"], shape=(None, None, 3))
        _check_picture(image, "image")
        model = await self._models.get(request.model)
        if not isinstance(model, PictureAdapter):
            raise InvalidArgument("model", request.model, "a T2I-Adapter: ControlNets are asked by Control")
        with self._metrics.stage.time("adapt"):
            found = await self._models.lane.run(model.features, image)
        return pb.AdaptPictureResponse(features=map(to_proto, found), backend=self._backend(request.model))

    async def _start(self, session: Session | None, request: Request) -> Session:
        said = request.message.WhichOneof("message")
        if session is not None or said != "start":
            raise InvalidArgument("message", said, "start once, then step")
        start = request.message.start
        check_range("start.units", len(start.units), 1, MAX_CONTROLS)
        units = [await self._unit(request, i) for i in range(len(start.units))]
        size = units[0].image.shape
        for i, unit in enumerate(units):
            if unit.image.shape != size:
                raise InvalidArgument(
                    f"start.units[{i}].image.shape", list(unit.image.shape), f"{list(size)}, as the first"
                )
        field = "start.encoder_hidden_states"
        embeddings = request.array(start.encoder_hidden_states, field, dtypes=FLOATS, shape=(None, None, None))
        rows = len(embeddings)
        check_range(f"{field}.shape[0]", rows, 1, 2 * MAX_IMAGES)  # with guidance a picture has two
        check_range(f"{field}.shape[1]", embeddings.shape[1], 1, MAX_TOKENS)
        check_pixels(field, (rows + 1) // 2, size[1], size[0])
        check_range("start.negative_rows", start.negative_rows, 0, rows - 1)
        check_rounding("start.residuals", start.residuals)
        added = {name: _added(name, request, rows) for name in sorted(start.added_conditions)}
        embeddings = require_finite(embeddings, field)
        return await self._models.lane.run(Session, units, embeddings, added, start.negative_rows)

    async def _unit(self, request: Request, index: int) -> Unit:
        unit, field = request.message.start.units[index], f"start.units[{index}]"
        model = await self._models.get(unit.model)
        if not isinstance(model, ControlModel):
            raise InvalidArgument(f"{field}.model", unit.model, "a ControlNet: T2I-Adapters are asked by AdaptPicture")
        check_range(f"{field}.scale", unit.scale, 0, MAX_CONTROL_SCALE)
        check_block_weights(f"{field}.block_weights", unit.block_weights)
        image = request.array(unit.image, f"{field}.image", dtypes=["uint8"], shape=(None, None, 3))
        _check_picture(image, f"{field}.image")
        kind = unit.control_type if unit.HasField("control_type") else None
        return Unit(model, image, unit.scale, unit.guess_mode, tuple(unit.block_weights), kind)

    async def _answers(
        self, session: Session | None, start: pb.ControlStart, request: Request
    ) -> AsyncGenerator[Response, None]:
        """One step's: a message for each part, or one for all of them."""
        if session is None:
            raise InvalidArgument("message", "step", "start before the first step")
        step, shape = request.message.step, (None, None, None, None)
        sample = require_finite(request.array(step.sample, "step.sample", dtypes=FLOATS, shape=shape), "step.sample")
        if not math.isfinite(step.timestep):
            raise InvalidArgument("step.timestep", step.timestep, "finite")
        places = _places(step, len(start.units))
        if step.HasField("encoder_hidden_states"):
            await self._models.lane.run(session.tell, *_changed(session, request))
        held: list[Part] = []
        async with aclosing(self._parts(partial(session.residuals, sample, step.timestep, places))) as parts:
            async for part in parts:
                held.append(part)
                if part.mid is not None:
                    self._metrics.batch_size.observe(len(sample))
                if start.by_block or part.mid is not None:
                    told = (held, self._backend(*(unit.model for unit in start.units)), start.residuals)
                    yield await asyncio.to_thread(self._response, *told) if told[-1] else self._response(*told)
                    held = []

    async def _parts(self, produce: Callable[[Emit], None]) -> AsyncGenerator[Part, None]:
        """What ``produce`` emits on the lane, while it goes on; when nobody listens any more, it goes no further."""
        loop, parts, gone = asyncio.get_running_loop(), asyncio.Queue[Part | None](), False

        def emit(part: Part) -> None:
            if gone:
                raise _Gone
            loop.call_soon_threadsafe(parts.put_nowait, part)

        producing = asyncio.create_task(self._produce(produce, emit))
        producing.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            while (part := await parts.get()) is not None:
                if part.mid is not None:
                    await producing
                yield part
            await producing
        finally:
            gone = True
            producing.cancel()

    async def _produce(self, produce: Callable[[Emit], None], emit: Emit) -> None:
        waited = current_call().queue_seconds
        with self._metrics.step.time(), self._metrics.stage.time("control"):
            await self._models.lane.run(produce, emit)
        self._metrics.queue_wait.observe(current_call().queue_seconds - waited)

    def _response(self, parts: list[Part], backend: str, rounding: str = "") -> Response:
        answer, message = Response(), pb.ControlResponse(backend=backend)
        for residual in (one for part in parts for one in part.down):
            values, scales = rounded(residual, rounding) if rounding else (residual, None)
            message.down_residuals.append(answer.add(values))
            if scales is not None:
                message.down_scales.append(answer.add(scales))
        if parts[-1].mid is not None:
            values, scales = rounded(parts[-1].mid, rounding) if rounding else (parts[-1].mid, None)
            message.mid_residual.CopyFrom(answer.add(values))
            if scales is not None:
                message.mid_scales.CopyFrom(answer.add(scales))
        return answer.seal(message)

    def _backend(self, *models: str) -> str:
        """What runs them."""
        return ", ".join(dict.fromkeys(self._models.engine_of(name).name for name in models))


def _check_picture(image: Array, field: str) -> None:
    for axis in (0, 1):
        check_size(f"{field}.shape[{axis}]", image.shape[axis], 8)


def _places(step: pb.ControlStep, units: int) -> list[int]:
    """The places of the units at work, in the order of the start."""
    places = sorted(step.units) or list(range(units))
    if len(set(places)) < len(places) or places[-1] >= units:
        raise InvalidArgument("step.units", list(step.units), f"places among {units} units, each once")
    return places


def _changed(session: Session, request: Request) -> tuple[Array, dict[str, Array]]:
    """What takes the place of the start's embeddings and conditions: of the same names and shapes."""
    step, field = request.message.step, "step.encoder_hidden_states"
    embeddings = request.array(step.encoder_hidden_states, field, dtypes=FLOATS, shape=session.embeddings.shape)
    if set(step.added_conditions) != set(session.added):
        allowed = f"a map of {' and '.join(sorted(session.added)) or 'nothing'}, as at the start"
        raise InvalidArgument("step.added_conditions", sorted(step.added_conditions), allowed)
    added: dict[str, Array] = {}
    for name, before in session.added.items():
        path = f"step.added_conditions[{name!r}]"
        found = request.array(step.added_conditions[name], path, dtypes=FLOATS, shape=before.shape)
        added[name] = require_finite(found, path)
    return require_finite(embeddings, field), added


def _added(name: str, request: Request, rows: int) -> Array:
    if name not in ADDED:
        raise InvalidArgument("start.added_conditions", name, " or ".join(ADDED))
    field = f"start.added_conditions[{name!r}]"
    tensor = request.message.start.added_conditions[name]
    found = request.array(tensor, field, dtypes=FLOATS, shape=(rows, None))
    check_range(f"{field}.shape[1]", found.shape[1], 1, MAX_TOKENS)
    return require_finite(found, field)
