"""Requests to arrays and back."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels, ModelCard
from imagemesh_runtime.savings import lossy
from imagemesh_runtime.tensors import map_to_proto, to_proto
from imagemesh_services.diffusion.backend import DiffusionModel, SampleInputs
from imagemesh_services.diffusion.checkpoint import request_digest, to_message
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.control import open_control
from imagemesh_services.diffusion.controlnets import ControlNets
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Event, Frozen, OpenControl, Progress, Queued, Started
from imagemesh_services.diffusion.guiders import GUIDERS
from imagemesh_services.diffusion.knees import rows_on_file
from imagemesh_services.diffusion.requests import read_inputs, read_terms
from imagemesh_services.diffusion.scheduler_options import OPTIONS
from imagemesh_services.diffusion.schedulers import SCHEDULERS

_SIZES_TOLD = 16


class DiffusionServicer(rpc.DiffusionServiceServicer):
    """Samples; whoever is here shares the model step by step."""

    def __init__(
        self,
        config: DiffusionConfig,
        models: LoadedModels[DiffusionModel],
        controlnets: ControlNets | None,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._models = models
        self._controlnets = controlnets
        self._metrics = metrics
        tuned = rows_on_file(config, models.backend.device, models.backend.dtype)
        self.engine = Engine(
            models.lane, metrics, max_rows=config.max_batch, max_queue=config.max_queue, tuned=tuned,
            hang_seconds=config.hang_seconds, hang_factor=config.hang_factor,
            control_wait=config.control_wait_seconds,
        )  # fmt: skip

    def describe(self, card: ModelCard) -> Mapping[str, str]:
        """The most rows of a batch that are in force for a model, at its own size and at those that were measured."""
        limits, model = self.engine.limits, self._models.in_memory(card.name)
        if model is None:
            return {}
        own = limits.of((model.fingerprint, int(card.properties["width"]), int(card.properties["height"])))
        by_size = {}
        for kind in limits.kinds():
            if isinstance(kind, tuple) and kind[0] == model.fingerprint:
                at = limits.of(kind)
                by_size[f"{kind[1]}x{kind[2]}"] = f"{at.rows} {at.source}"
        told = {"max_rows": str(own.rows), "max_rows_from": own.source}
        if by_size:
            told["max_rows_by_size"] = ", ".join(
                f"{size}: {limit}" for size, limit in list(by_size.items())[-_SIZES_TOLD:]
            )
        return told

    async def Sample(self, request: pb.SampleRequest, context: Any) -> AsyncIterator[pb.SampleResponse]:
        try:
            model = await self._models.get(request.model)
            inputs = read_inputs(request, model)
            names = [one.adapter for one in inputs.references]
            adapters = await asyncio.to_thread(model.find_adapters, names) if names else ()
            fingerprint = f"{model.fingerprint}-{request_digest(request, adapters)}"
            terms = read_terms(request, fingerprint)
            control = self._control(request, inputs)
            with self._metrics.stage.time("sample"):
                async with aclosing(self.engine.sample(model, inputs, control, terms)) as events:
                    async for event in events:
                        response = self._response(event, inputs.steps_to_do, fingerprint)
                        if response.HasField("result"):
                            response.result.backend = self._models.engine_of(request.model).name
                            response.result.lossy.update(lossy(request.control_savings))
                        yield response
        except (asyncio.CancelledError, GeneratorExit):
            if not current_call().expired():
                self._metrics.cancelled.inc()
            raise

    async def ConfirmCheckpoint(
        self, request: pb.ConfirmCheckpointRequest, context: Any
    ) -> pb.ConfirmCheckpointResponse:
        self.engine.confirm(request.confirm_as, request.evaluation)
        return pb.ConfirmCheckpointResponse()

    async def ListSchedulers(self, request: pb.ListSchedulersRequest, context: Any) -> pb.ListSchedulersResponse:
        infos = [
            pb.SchedulerInfo(
                name=choice.name,
                class_name=choice.class_name,
                options={key: json.dumps(value) for key, value in choice.options.items()},
                accepts={key: option.allowed for key, option in OPTIONS[choice.class_name].items()},
            )
            for choice in SCHEDULERS.values()
        ]
        return pb.ListSchedulersResponse(schedulers=infos)

    async def ListGuiders(self, request: pb.ListGuidersRequest, context: Any) -> pb.ListGuidersResponse:
        infos = [
            pb.GuiderInfo(
                name=guider.name,
                class_name=guider.class_name,
                about=guider.about,
                options={key: json.dumps(value) for key, value in guider.options.items()},
                accepts={key: values.allowed for key, values in guider.accepts.items()},
            )
            for guider in GUIDERS.values()
        ]
        return pb.ListGuidersResponse(guiders=infos)

    def _response(self, event: Event, steps: int, fingerprint: str) -> pb.SampleResponse:
        if isinstance(event, Queued):
            return pb.SampleResponse(queued=pb.SampleQueued(position=event.position))
        if isinstance(event, Started):
            return pb.SampleResponse(started=pb.SampleStarted())
        if isinstance(event, Progress):
            preview = None if event.preview is None else to_proto(event.preview)
            return pb.SampleResponse(progress=pb.SampleProgress(step=event.step, steps=steps, preview=preview))
        if isinstance(event, Frozen):
            return pb.SampleResponse(checkpoint=to_message(event.checkpoint, fingerprint))
        result = pb.SampleResult(
            outputs=map_to_proto({"latents": event.latents}),
            scheduler=event.scheduler,
            evaluations=event.evaluations,
            control_backends=event.control_backends,
        )
        return pb.SampleResponse(result=result)

    def _control(self, request: pb.SampleRequest, inputs: SampleInputs) -> OpenControl | None:
        if not request.controls:
            return None
        if self._controlnets is None:
            raise FailedPrecondition(
                "this diffusion service has no ControlNet service: set IMAGEMESH_DIFFUSION_CONTROLNET"
            )
        nets, timeout = self._controlnets, self._config.control_timeout_seconds
        savings = inputs.savings
        negative = len(inputs.seeds) if inputs.guided and not savings.conditional_only else 0
        return lambda told: open_control(nets, request.controls, told, negative, timeout, savings.residuals)
