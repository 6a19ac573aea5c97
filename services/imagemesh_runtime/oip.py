"""The Open Inference Protocol v2 in Triton's dialect (``inference.GRPCInferenceService``), so that its clients work.

The messages are tritonclient's own: a second copy of the same symbols would collide in protobuf's pool. Only this
module and ``oip_messages`` know them. https://github.com/kserve/open-inference-protocol
"""

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from importlib.metadata import version
from time import perf_counter_ns
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    MeshError,
    NotFound,
    Unimplemented,
)
from imagemesh_runtime.oip_memory import Regions, require_near
from imagemesh_runtime.oip_messages import Reader, model_config, model_metadata, model_statistics, values_of
from imagemesh_runtime.oip_models import VERSION, Arrays, OipModel
from imagemesh_runtime.oip_tensors import check_together

log = logging.getLogger(__name__)

FULL_NAME: Final = "inference.GRPCInferenceService"
_EXTENSIONS: Final = (
    "classification", "model_repository", "model_configuration", "statistics", "system_shared_memory", "trace",
    "logging", "parameters", "binary_tensor_data",
)  # fmt: skip
_FINAL, _EMPTY_FINAL = "triton_final_response", "triton_enable_empty_final_response"


class InferenceServicer(rpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated without types
    """All 20 methods over a fixed set of models.

    Args:
        seconds: how long one request of a stream may take.
        count_message: called for each request of a stream; refuses one by raising a ``MeshError``.
        tenant: whose regions of shared memory a call sees.
    """

    def __init__(
        self,
        server: str,
        models: Sequence[OipModel],
        ready: Any,
        seconds: float,
        *,
        count_message: Callable[[], None] = lambda: None,
        tenant: Callable[[], str] = lambda: "",
    ) -> None:
        self._server = server
        self._models = {model.name: model for model in models}
        self._ready = ready
        self._seconds = seconds
        self._count_message = count_message
        self._tenant = tenant
        self._by_tenant: defaultdict[str, Regions] = defaultdict(Regions)

    @property
    def _regions(self) -> Regions:
        return self._by_tenant[self._tenant()]

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=bool(self._ready()))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        try:
            model = self._find(request.name, request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=model.ready is None or await model.ready())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=self._server, version=version("imagemesh"), extensions=_EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        return model_metadata(self._find(request.name, request.version))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=model_config(self._find(request.name, request.version)))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        model = self._find(request.model_name, request.model_version)
        if model.infer is None:
            raise Unimplemented(f"model {model.name!r} is decoupled: it answers more than once, so it needs a stream")
        return await self._infer(model, request, context)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        async for request in request_iterator:
            try:
                async with aclosing(self._in_time(request, context)) as responses:
                    async for response in responses:
                        yield pb.ModelStreamInferResponse(infer_response=response)
            except MeshError as error:
                told = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
                told.parameters[_FINAL].bool_param = True
                yield pb.ModelStreamInferResponse(error_message=str(error), infer_response=told)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        try:
            models = [self._find(request.name, request.version)] if request.name else self._loaded()
        except NotFound as error:
            raise InvalidArgument("name", request.name, f"a loaded model's ({', '.join(self._names())})") from error
        return pb.ModelStatisticsResponse(model_stats=[model_statistics(model) for model in models])

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        index = pb.RepositoryIndexResponse()
        for model in self._models.values():
            if model.loaded:
                index.models.add(name=model.name, version=VERSION, state="READY")
            elif not request.ready:
                index.models.add(name=model.name, version=VERSION, state="UNAVAILABLE", reason="unloaded")
        return index

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> pb.RepositoryModelLoadResponse:
        name = request.model_name or request.repository_name  # KServe's client has it in the other one's place
        if name not in self._models:
            raise MeshError(
                f"failed to load {name[:80]!r}: there is no such model; there are {', '.join(self._models)}"
            )
        for parameter in request.parameters:
            raise InvalidArgument("parameters", parameter, "none: models have the configuration that they have")
        self._models[name].loaded = True
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        model = self._models.get(request.model_name or request.repository_name)
        if model is not None:
            model.loaded = False
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Any
    ) -> pb.SystemSharedMemoryStatusResponse:
        require_near(context.peer())
        told = pb.SystemSharedMemoryStatusResponse()
        for name, one in self._regions.told(request.name).items():
            region = told.regions[name]
            region.name, region.key, region.offset, region.byte_size = name, one.key, one.offset, one.byte_size
        return told

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Any
    ) -> pb.SystemSharedMemoryRegisterResponse:
        require_near(context.peer())
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Any
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        require_near(context.peer())
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> pb.CudaSharedMemoryStatusResponse:
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> pb.CudaSharedMemoryRegisterResponse:
        raise InvalidArgument("name", request.name, "none: this server has no CUDA memory to share")

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> pb.CudaSharedMemoryUnregisterResponse:
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Any) -> pb.TraceSettingResponse:
        told = pb.TraceSettingResponse()  # traces are W3C's here, and not set by calls
        told.settings["trace_level"].value.append("OFF")
        return told

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Any) -> pb.LogSettingsResponse:
        if "log_file" in request.settings:
            raise Unimplemented("log_file can't be set: the log goes where the process's output goes")
        told = pb.LogSettingsResponse()
        for name in ("log_info", "log_warning", "log_error"):
            told.settings[name].bool_param = True
        told.settings["log_verbose_level"].uint32_param = 0
        return told

    def _names(self) -> list[str]:
        return [model.name for model in self._loaded()]

    def _loaded(self) -> list[OipModel]:
        return [model for model in self._models.values() if model.loaded]

    def _find(self, name: str, asked: str) -> OipModel:
        if asked and not asked.isdecimal():
            raise InvalidArgument("version", asked, f"a whole number, such as {VERSION}")
        model = self._models.get(name)
        if model is None or not model.loaded:
            raise NotFound("model", name, self._names())
        if asked not in ("", VERSION):
            raise NotFound(f"version of model {name!r}", asked, [VERSION])
        return model

    async def _infer(self, model: OipModel, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        assert model.infer is not None
        start = perf_counter_ns()
        try:
            reader = Reader(model, request, self._regions, context.peer())
            arrays = reader.inputs()
            batch = check_together(model, arrays)
            read = perf_counter_ns()
            made = await model.infer(arrays, values_of(request.parameters))
            done = perf_counter_ns()
            response = await reader.response(made)
        except BaseException:
            model.statistics.fail.add(perf_counter_ns() - start)
            raise
        model.statistics.note(batch, (read - start, done - read, perf_counter_ns() - done))
        return response

    async def _in_time(
        self, request: pb.ModelInferRequest, context: Any
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The answers to one request of a stream, which has a deadline of its own within the stream's, if it has one.

        Raises:
            DeadlineExceeded: they did not all come in time.
            MeshError: whatever else went wrong, also what is unforeseen: the other requests go on.
        """
        call, end = current_call(), time.monotonic() + self._seconds
        whole = call.deadline
        call.deadline = end if whole is None else min(end, whole)
        try:
            self._count_message()
            async with aclosing(self._answers(request, context)) as responses:
                while True:
                    async with asyncio.timeout(end - time.monotonic()) as limit:
                        response = await anext(responses, None)
                    if response is None:
                        return
                    yield response
        except MeshError:
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                told = f"model {request.model_name!r} did not answer within {self._seconds:g} s"
                raise DeadlineExceeded(self._server, told) from error
            error_id = secrets.token_hex(8)
            log.error("a request of ModelStreamInfer failed, error id %s", error_id, exc_info=error)
            raise InternalError(error_id) from error
        finally:
            call.deadline = whole

    async def _answers(
        self, request: pb.ModelInferRequest, context: Any
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        model = self._find(request.model_name, request.model_version)
        if model.stream is None:
            response = await self._infer(model, request, context)
            response.parameters[_FINAL].bool_param = True
            yield response
            return
        start = perf_counter_ns()
        try:
            reader = Reader(model, request, self._regions, context.peer())
            arrays = reader.inputs()
            check_together(model, arrays)
            async with aclosing(_streamed(model, reader, arrays, request)) as responses:
                async for response in responses:
                    yield response
        except BaseException:
            model.statistics.fail.add(perf_counter_ns() - start)
            raise
        model.statistics.note(1, (0, perf_counter_ns() - start, 0))


async def _streamed(
    model: OipModel, reader: Reader, arrays: Arrays, request: pb.ModelInferRequest
) -> AsyncGenerator[pb.ModelInferResponse, None]:
    """Each answer that has something that was asked for; where the client wants one, an empty one closes."""
    assert model.stream is not None
    closes = request.parameters[_EMPTY_FINAL].bool_param if _EMPTY_FINAL in request.parameters else False
    async with aclosing(model.stream(arrays, values_of(request.parameters))) as answers:
        async for made, last in answers:
            response = await reader.response(made)
            response.parameters[_FINAL].bool_param = last and not closes
            if response.outputs:
                yield response
    if closes:
        final = pb.ModelInferResponse(model_name=model.name, model_version=VERSION, id=request.id)
        final.parameters[_FINAL].bool_param = True
        yield final


def add_inference(servicer: InferenceServicer, server: Any) -> None:
    """Register the servicer; the generated function's types are nobody's."""
    rpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
