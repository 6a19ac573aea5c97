"""Requests to arrays and back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.limits import (
    MAX_CONTROL_SCALE,
    MAX_CONTROLS,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    check_pixels,
    check_range,
    check_size,
)
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import FLOATS, Array, from_proto, map_to_proto, require_finite
from imagemesh_services.diffusion.backend import DiffusionModel, Run, SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.control import Control, open_control
from imagemesh_services.diffusion.queue import SamplerQueue
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler


class DiffusionServicer(rpc.DiffusionServiceServicer):
    """Samples, one generation at a time."""

    def __init__(
        self, config: DiffusionConfig, models: LoadedModels[DiffusionModel], controlnet: Peer | None, metrics: Metrics
    ) -> None:
        self._config = config
        self._models = models
        self._controlnet = controlnet
        self._metrics = metrics
        self._queue = SamplerQueue(config.max_queue, metrics)

    async def Sample(self, request: pb.SampleRequest, context: Any) -> AsyncIterator[pb.SampleResponse]:
        try:
            model = await self._models.get(request.model)
            inputs = _inputs(request, model.scale_factor)
            yield pb.SampleResponse(queued=pb.SampleQueued(position=self._queue.admit()))
            async with self._queue.turn():
                with self._metrics.stage.time("sample"):
                    async for event in self._run(request, model, inputs):
                        yield event
        except (asyncio.CancelledError, GeneratorExit):
            self._metrics.cancelled.inc()
            raise

    async def ListSchedulers(self, request: pb.ListSchedulersRequest, context: Any) -> pb.ListSchedulersResponse:
        infos = [
            pb.SchedulerInfo(
                name=choice.name,
                class_name=choice.class_name,
                options={key: json.dumps(value) for key, value in choice.options.items()},
            )
            for choice in SCHEDULERS.values()
        ]
        return pb.ListSchedulersResponse(schedulers=infos)

    async def _run(
        self, request: pb.SampleRequest, model: DiffusionModel, inputs: SampleInputs
    ) -> AsyncIterator[pb.SampleResponse]:
        lane = self._models.lane
        run = await lane.run(model.start, inputs)
        async with AsyncExitStack() as stack:
            control = None
            if request.controls:
                control = await stack.enter_async_context(self._control(request, await lane.run(run.embeddings)))
            for _ in range(run.evaluations):
                await self._evaluate(run, control)
                self._metrics.batch_size.observe(inputs.rows)
                yield pb.SampleResponse(progress=pb.SampleProgress(step=run.steps_done(), steps=inputs.steps))
        result = pb.SampleResult(
            outputs=map_to_proto({"latents": await lane.run(run.latents)}),
            scheduler=run.scheduler,
            evaluations=run.evaluations,
            backend=self._models.backend.name,
            control_backends=control.backends if control else (),
        )
        yield pb.SampleResponse(result=result)

    async def _evaluate(self, run: Run, control: Control | None) -> None:
        """One evaluation of the model; between two of them a cancelled call ends."""
        lane = self._models.lane
        with self._metrics.step.time():
            residuals = await control.residuals(*await lane.run(run.model_input)) if control else None
            await lane.run(run.advance, residuals)

    def _control(self, request: pb.SampleRequest, embeddings: Array) -> Any:
        if self._controlnet is None:
            raise FailedPrecondition(
                "this diffusion service has no ControlNet service: set IMAGEMESH_DIFFUSION_CONTROLNET"
            )
        return open_control(self._controlnet, request.controls, embeddings, self._config.control_timeout_seconds)


def _inputs(request: pb.SampleRequest, multiple: int) -> SampleInputs:
    check_size("width", request.width, multiple)
    check_size("height", request.height, multiple)
    check_range("steps", request.steps, 1, MAX_STEPS)
    check_range("guidance_scale", request.guidance_scale, 0, MAX_GUIDANCE)
    check_range("seeds", len(request.seeds), 1, MAX_IMAGES)
    check_pixels("seeds", len(request.seeds), request.width, request.height)
    check_range("controls", len(request.controls), 0, MAX_CONTROLS)
    for i, seed in enumerate(request.seeds):
        check_range(f"seeds[{i}]", seed, 0, MAX_SEED)
    for i, unit in enumerate(request.controls):
        check_range(f"controls[{i}].scale", unit.scale, 0, MAX_CONTROL_SCALE)
    guided = request.guidance_scale > 1
    return SampleInputs(
        conditioning=_conditioning(request, guided),
        width=request.width,
        height=request.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        scheduler=find_scheduler(request.scheduler),
        seeds=tuple(request.seeds),
    )


def _conditioning(request: pb.SampleRequest, guided: bool) -> dict[str, Array]:
    names = ["prompt_embeds", "negative_prompt_embeds"] if guided else ["prompt_embeds"]
    found: dict[str, Array] = {}
    for name in names:
        field = f"conditioning[{name!r}]"
        if name not in request.conditioning:
            raise InvalidArgument("conditioning", sorted(request.conditioning), f"a map with {name!r}")
        embeds = from_proto(request.conditioning[name], field, dtypes=FLOATS, shape=(1, None, None))
        found[name] = require_finite(embeds, field)
    if len({embeds.shape for embeds in found.values()}) > 1:
        shapes = {name: embeds.shape for name, embeds in found.items()}
        raise InvalidArgument("conditioning", shapes, "embeddings of equal shape")
    return found
