"""Requests to arrays and back."""

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import InvalidArgument, Overloaded
from imagemesh_runtime.limits import MAX_CONTROL_SCALE, MAX_IMAGES, MAX_TOKENS, check_pixels, check_range, check_size
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel, takes_parcels
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import FLOATS, Array, require_finite
from imagemesh_services.controlnet.backend import ControlInputs, ControlModel, ControlRun
from imagemesh_services.controlnet.config import ControlNetConfig

# What some families add to the prompts' embeddings, by diffusers' names.
ADDED = ("text_embeds", "time_ids")


class ControlNetServicer(rpc.ControlNetServiceServicer):
    """A session a generation: what stays the same once, then residuals for every evaluation."""

    def __init__(self, config: ControlNetConfig, models: LoadedModels[ControlModel], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._max_sessions = config.max_queue
        self._sessions = 0

    @takes_parcels
    async def Control(  # type: ignore[override]
        self, request_iterator: AsyncIterator[Parcel[pb.ControlRequest]], context: Any
    ) -> AsyncIterator[Parcel[pb.ControlResponse]]:
        if self._sessions >= self._max_sessions:
            raise Overloaded("controlnet", self._max_sessions, 1.0)
        self._sessions += 1
        try:
            with self._metrics.running.track_inprogress():
                session: _Session | None = None
                async for request in request_iterator:
                    if request.message.WhichOneof("message") == "step":
                        yield await self._residuals(session, request)
                    else:
                        session = await self._start(session, request)
        finally:
            self._sessions -= 1

    async def _start(self, session: "_Session | None", request: Parcel[pb.ControlRequest]) -> "_Session":
        said = request.message.WhichOneof("message")
        if session is not None or said != "start":
            raise InvalidArgument("message", said, "start once, then step")
        start = request.message.start
        model = await self._models.get(start.model)
        check_range("start.scale", start.scale, 0, MAX_CONTROL_SCALE)
        image = request.array(start.image, "start.image", dtypes=["uint8"], shape=(None, None, 3))
        for axis in (0, 1):
            check_size(f"start.image.shape[{axis}]", image.shape[axis], 8)
        field = "start.encoder_hidden_states"
        embeddings = request.array(start.encoder_hidden_states, field, dtypes=FLOATS, shape=(None, None, None))
        rows = len(embeddings)
        check_range(f"{field}.shape[0]", rows, 1, 2 * MAX_IMAGES)  # with guidance a picture has two
        check_range(f"{field}.shape[1]", embeddings.shape[1], 1, MAX_TOKENS)
        check_pixels(field, (rows + 1) // 2, image.shape[1], image.shape[0])
        added = {name: _added(name, request, rows) for name in sorted(start.added_conditions)}
        inputs = ControlInputs(image, require_finite(embeddings, field), start.scale, added)
        return _Session(inputs, await self._models.lane.run(model.start, inputs))

    async def _residuals(
        self, session: "_Session | None", request: Parcel[pb.ControlRequest]
    ) -> Parcel[pb.ControlResponse]:
        if session is None:
            raise InvalidArgument("message", "step", "start before the first step")
        step, shape = request.message.step, (None, None, None, None)
        sample = require_finite(request.array(step.sample, "step.sample", dtypes=FLOATS, shape=shape), "step.sample")
        if not math.isfinite(step.timestep):
            raise InvalidArgument("step.timestep", step.timestep, "finite")
        waited = current_call().queue_seconds
        if step.HasField("encoder_hidden_states"):
            await self._models.lane.run(session.run.tell, *_changed(session.inputs, request))
        with self._metrics.step.time(), self._metrics.stage.time("control"):
            down, mid = await self._models.lane.run(session.run.residuals, sample, step.timestep)
        self._metrics.queue_wait.observe(current_call().queue_seconds - waited)
        self._metrics.batch_size.observe(len(sample))
        answer = Parcel[pb.ControlResponse]()
        return answer.seal(
            pb.ControlResponse(
                down_residuals=[answer.add(one) for one in down],
                mid_residual=answer.add(mid),
                backend=self._models.backend.name,
            )
        )


@dataclass(frozen=True)
class _Session:
    inputs: ControlInputs
    run: ControlRun


def _changed(inputs: ControlInputs, request: Parcel[pb.ControlRequest]) -> tuple[Array, dict[str, Array]]:
    """What takes the place of the start's embeddings and conditions: of the same names and shapes."""
    step, field = request.message.step, "step.encoder_hidden_states"
    embeddings = request.array(step.encoder_hidden_states, field, dtypes=FLOATS, shape=inputs.embeddings.shape)
    if set(step.added_conditions) != set(inputs.added):
        allowed = f"a map of {' and '.join(sorted(inputs.added)) or 'nothing'}, as at the start"
        raise InvalidArgument("step.added_conditions", sorted(step.added_conditions), allowed)
    added: dict[str, Array] = {}
    for name, before in inputs.added.items():
        path = f"step.added_conditions[{name!r}]"
        found = request.array(step.added_conditions[name], path, dtypes=FLOATS, shape=before.shape)
        added[name] = require_finite(found, path)
    return require_finite(embeddings, field), added


def _added(name: str, request: Parcel[pb.ControlRequest], rows: int) -> Array:
    if name not in ADDED:
        raise InvalidArgument("start.added_conditions", name, " or ".join(ADDED))
    field = f"start.added_conditions[{name!r}]"
    tensor = request.message.start.added_conditions[name]
    found = request.array(tensor, field, dtypes=FLOATS, shape=(rows, None))
    check_range(f"{field}.shape[1]", found.shape[1], 1, MAX_TOKENS)
    return require_finite(found, field)
