"""Generations for callers who hold the line, of which no job is kept."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.access.admission import Admission
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.pipeline import generate
from imagemesh_gateway.plan import make_plan
from imagemesh_runtime.metrics import Metrics


class Direct:
    """Checks, admits and runs them."""

    def __init__(self, mesh: Mesh, admission: Admission, metrics: Metrics) -> None:
        self._mesh = mesh
        self._admission = admission
        self._metrics = metrics

    async def stream(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The events of a generation, the last of which is its result.

        Raises:
            InvalidArgument, NotFound: the request can't be done.
            PermissionDenied, OverLimit: the caller may not have it, or not now.
            MeshError: a stage failed.
        """
        await self._admission.check()
        plan = await make_plan(request, self._mesh)
        async with (
            self._admission.direct(plan) as allowed,
            aclosing(generate(self._mesh, allowed, self._metrics)) as events,
        ):
            async for event in events:
                yield event

    async def result(self, request: pb.GenerateRequest) -> pb.GenerateResult:
        """The result alone; errors as ``stream``."""
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                if event.WhichOneof("event") == "result":
                    return event.result
        raise RuntimeError("the pipeline ended without a result")
