"""What a generation cost, stage by stage."""

from dataclasses import dataclass, field

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_runtime.client import Hop
from imagemesh_runtime.metrics import Metrics


@dataclass
class Ledger:
    """What ran each stage, and what each hop cost."""

    metrics: Metrics
    hops: dict[str, Hop] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    # The names of entries end with it.
    suffix: str = ""

    def hop(self, stage: str) -> Hop:
        """A new entry."""
        name = f"{stage}{self.suffix}"
        self.hops[name] = Hop()
        return self.hops[name]

    def device_seconds(self, service: str) -> float:
        """What the stages of a service took of its devices; 0: nobody has counted, or not all of it."""
        hops = [hop for stage, hop in self.hops.items() if stage.startswith(service)]
        return 0.0 if any(hop.moved for hop in hops) else sum(hop.device_seconds for hop in hops)

    def timings(self) -> list[pb.StageTiming]:
        """The entries, in the order of the stages."""
        return [
            pb.StageTiming(
                stage=stage,
                seconds=hop.seconds,
                compute_seconds=hop.compute_seconds,
                queue_seconds=hop.queue_seconds,
                bytes_sent=hop.bytes_sent,
                bytes_received=hop.bytes_received,
            )
            for stage, hop in self.hops.items()
        ]
