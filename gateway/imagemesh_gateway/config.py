"""Configuration of the gateway."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import MIB, ServerConfig


@dataclass(frozen=True)
class GatewayConfig(ServerConfig):
    """Where the gateway listens, where the services are, and what it takes when a request names no model."""

    SERVICE: ClassVar[str] = "gateway"
    listen: str = "127.0.0.1:50050"
    http_listen: str = "127.0.0.1:7860"
    # API keys, as "imagemesh keys create" writes them; empty: callers need none.
    keys_file: str = ""
    # Whether callers need no key where others than this machine can call, too.
    allow_anyone: bool = False
    # Of each service one replica's address, or several joined by commas; dns:///host:port is a replica at every address
    # of that name.
    text_encoder: str = "127.0.0.1:50051"
    diffusion: str = "127.0.0.1:50052"
    vae: str = "127.0.0.1:50053"
    controlnet: str = "127.0.0.1:50054"
    vit: str = "127.0.0.1:50055"
    # Empty: the first by name that the service has.
    default_model: str = ""
    default_controlnet: str = ""
    default_vit: str = ""
    max_message_bytes: int = 256 * MIB
    max_http_body_bytes: int = 32 * MIB
    # Of all bodies in work together; what is made of one takes up to four times as much.
    max_http_held_bytes: int = 512 * MIB
    # Requests of the HTTP face in work at a time; probes and scrapes are not counted.
    max_http_requests: int = 64
    # Those who follow a job by server-sent events or WebSocket, at a time.
    max_http_watches: int = 1000
    # How long a client may take to send a request's body.
    http_body_timeout_seconds: float = 60.0
    # Evaluations between two checkpoints of a generation, which another replica goes on from; 0: none.
    checkpoint_every: int = 5
    # How long a replica that failed is passed over, as long as there is another; up to ten times as long if it goes on.
    replica_rest_seconds: float = 5.0
    # How often names of services are resolved anew.
    resolve_seconds: float = 2.0
    # How long a service may take to say what models it has.
    catalogue_timeout_seconds: float = 5.0
    # How long its answer is believed.
    catalogue_ttl_seconds: float = 10.0
    # Where jobs and their pictures are kept; empty: in a folder of the user's state.
    jobs_folder: str = ""
    # Jobs in work at a time, at most.
    max_running_jobs: int = 256
    # Of these, how many for each diffusion replica may be without a first step, in its queue or being encoded: about a
    # batch. When one begins, the next is taken from the store, so that as many run as the samplers let in.
    max_starting_jobs: int = 8
    # Jobs that may wait; one more is refused with a time to come back.
    max_queued_jobs: int = 1000
    # How long a finished job and its pictures are kept, and how long one may ask for.
    job_retention_seconds: float = 86400.0
    max_job_retention_seconds: float = 7 * 86400.0
