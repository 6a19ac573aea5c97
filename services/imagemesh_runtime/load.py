"""What a service says of its load to who spreads work over replicas."""

from collections.abc import Callable
from typing import Any

from imagemesh.v1 import load_service_pb2 as pb
from imagemesh.v1 import load_service_pb2_grpc as rpc
from imagemesh_runtime.metrics import Metrics

FULL_NAME = "imagemesh.v1.LoadService"


class LoadServicer(rpc.LoadServiceServicer):
    """Tells what the metrics tell, without the way by a scraper."""

    def __init__(self, metrics: Metrics, ready: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._ready = ready

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: Any) -> pb.ReportLoadResponse:
        load = self._metrics.load()
        return pb.ReportLoadResponse(ready=self._ready(), requests=load.requests, backlog_seconds=load.backlog_seconds)
