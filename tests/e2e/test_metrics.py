"""What the services export equals what was sent, read with prometheus-client's own parser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from imagemesh_cli.host import MeshHost
from imagemesh_client import Client, Control
from imagemesh_runtime.errors import MeshError
from tests.support.mesh import running_mesh

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
EVERYWHERE = (
    "imagemesh_queue_wait_seconds",
    "imagemesh_step_seconds",
    "imagemesh_batch_size",
    "imagemesh_stage_seconds",
)


@pytest.fixture(scope="module")
def mesh(models: Path) -> Iterator[MeshHost]:
    with running_mesh(backend="torch", models=str(models)) as mesh:
        yield mesh


def scrape(address: str) -> Series:
    families = text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(series: Series, name: str, /, **labels: str) -> float:
    """The sum of the series of that name that carry those labels."""
    return sum(number for (found, held), number in series.items() if found == name and labels.items() <= set(held))


def grown(before: Series, after: Series, name: str, /, **labels: str) -> float:
    return value(after, name, **labels) - value(before, name, **labels)


@pytest.fixture
def addresses(mesh: MeshHost) -> dict[str, str]:
    found = {name: server.metrics_http.address for name, server in mesh.services.items()}
    return found | {"gateway": mesh.gateway.metrics_http.address}


class Growth:
    """How much each series of each service grew while the block ran."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._addresses = addresses

    def __enter__(self) -> Self:
        self._before = {name: scrape(address) for name, address in self._addresses.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self._after = {name: scrape(address) for name, address in self._addresses.items()}

    def __call__(self, where: str, name: str, /, **labels: str) -> float:
        return grown(self._before[where], self._after[where], name, **labels)


@pytest.fixture(scope="module")
def grew(mesh: MeshHost, control_image: object) -> Growth:
    """Two generations, one of two pictures with a ControlNet, three pictures classified, one request refused."""
    found = {name: server.metrics_http.address for name, server in mesh.services.items()}
    found["gateway"] = mesh.gateway.metrics_http.address
    with Growth(found) as growth, Client(mesh.grpc_address) as client:
        for seed in (1, 2):
            client.generate("a fox", steps=5, seed=seed, scheduler="DDIM")
        client.generate("a fox", steps=3, seed=1, n=2, scheduler="Heun", controls=[Control(control_image)])  # type: ignore[arg-type]
        client.classify([control_image] * 3)  # type: ignore[list-item]
        with pytest.raises(MeshError):
            client.generate("x", steps=0)
    return growth


def test_the_gateway_counts_calls_by_code_and_messages(grew: Growth) -> None:
    generate = {"grpc_type": "server_stream", "grpc_service": "imagemesh.v1.GatewayService", "grpc_method": "Generate"}
    assert grew("gateway", "grpc_server_started_total", **generate) == 4
    assert grew("gateway", "grpc_server_handled_total", **generate, grpc_code="OK") == 3
    assert grew("gateway", "grpc_server_handled_total", **generate, grpc_code="INVALID_ARGUMENT") == 1
    assert grew("gateway", "grpc_server_msg_received_total", **generate) == 4
    # Each generation says queued, every evaluation (3 steps of Heun evaluate 5 times), result.
    assert grew("gateway", "grpc_server_msg_sent_total", **generate) == 2 * (1 + 5 + 1) + (1 + 5 + 1)
    assert grew("gateway", "grpc_server_handling_seconds_count", **generate) == 4


def test_the_sampler_counts_steps_rows_and_waits(grew: Growth) -> None:
    sample = {"grpc_type": "server_stream", "grpc_service": "imagemesh.v1.DiffusionService", "grpc_method": "Sample"}
    assert grew("diffusion", "grpc_server_handled_total", **sample, grpc_code="OK") == 3
    assert grew("diffusion", "imagemesh_step_seconds_count", service="diffusion") == 5 + 5 + 5
    # Rows of a batch: with guidance two a picture.
    assert grew("diffusion", "imagemesh_batch_size_sum", service="diffusion") == 10 * 2 + 5 * 4
    assert grew("diffusion", "imagemesh_queue_wait_seconds_count", service="diffusion") == 3
    assert grew("diffusion", "imagemesh_stage_seconds_count", service="diffusion", stage="sample") == 3


def test_the_controlnet_counts_its_session(grew: Growth) -> None:
    control = {"grpc_type": "bidi_stream", "grpc_service": "imagemesh.v1.ControlNetService", "grpc_method": "Control"}
    assert grew("controlnet", "grpc_server_started_total", **control) == 1
    assert grew("controlnet", "grpc_server_handled_total", **control, grpc_code="OK") == 1
    assert grew("controlnet", "grpc_server_msg_received_total", **control) == 1 + 5
    # That it is at work, then a message a block: the picture's, two down blocks', the middle one's.
    assert grew("controlnet", "grpc_server_msg_sent_total", **control) == 5 * (1 + 4)
    for histogram in ("step_seconds", "queue_wait_seconds", "batch_size"):
        assert grew("controlnet", f"imagemesh_{histogram}_count", service="controlnet") == 5
    # Rows of a batch: two pictures, each with guidance.
    assert grew("controlnet", "imagemesh_batch_size_sum", service="controlnet") == 5 * 4
    assert grew("controlnet", "imagemesh_stage_seconds_count", service="controlnet", stage="control") == 5


def test_the_sampler_tells_how_long_it_waited_for_residuals_and_of_how_many_bytes(grew: Growth) -> None:
    for where in ("before", "within"):
        assert grew("diffusion", "imagemesh_control_stall_seconds_count", service="diffusion", where=where) == 5
    shared = {"service": "diffusion", "path": "shm", "direction": "received"}
    received = grew("diffusion", "imagemesh_transport_bytes_total", **shared)
    assert grew("diffusion", "imagemesh_control_bytes_total", service="diffusion") == received > 0


def test_the_other_services_count_rows(grew: Growth) -> None:
    # The same two prompts three times: they are encoded once, a row each.
    assert grew("text-encoder", "imagemesh_batch_size_sum", service="text-encoder") == 2
    assert grew("vae", "imagemesh_batch_size_sum", service="vae") == 1 + 1 + 2
    assert grew("vae", "imagemesh_stage_seconds_count", stage="decode") == 3
    assert grew("vit", "imagemesh_batch_size_sum", service="vit") == 3
    requests = {"text-encoder": 1, "vae": 3, "vit": 1}
    for service, count in requests.items():
        assert grew(service, "imagemesh_queue_wait_seconds_count", service=service) == count
        assert grew(service, "imagemesh_step_seconds_count", service=service) == count
    assert grew("text-encoder", "imagemesh_stage_seconds_count", stage="encode_text") == 1
    assert grew("vit", "imagemesh_stage_seconds_count", service="vit") == 2  # decoded, classified
    unary = {"grpc_type": "unary", "grpc_service": "imagemesh.v1.VaeService", "grpc_method": "DecodeLatents"}
    assert grew("vae", "grpc_server_handled_total", **unary, grpc_code="OK") == 3


def test_every_service_exports_the_histograms(addresses: dict[str, str]) -> None:
    for name, address in addresses.items():
        exported = {
            family.name for family in text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text)
        }
        assert set(EVERYWHERE) <= exported, name


def test_times_add_up(mesh: MeshHost, addresses: dict[str, str]) -> None:
    before = scrape(addresses["diffusion"])
    with Client(mesh.grpc_address) as client:
        generation = client.generate("a fox", steps=20, seed=1, scheduler="DDIM")
    after = scrape(addresses["diffusion"])
    hop = {timing.stage: timing for timing in generation.timings}["diffusion"]
    steps = grown(before, after, "imagemesh_step_seconds_sum")
    stage = grown(before, after, "imagemesh_stage_seconds_sum", stage="sample")
    assert 0 < steps <= stage <= hop.seconds
    assert hop.compute_seconds <= stage


def test_the_gateways_http_face_has_its_metrics_and_its_readiness(mesh: MeshHost) -> None:
    assert value(scrape(mesh.http_address), "grpc_server_started_total") > 0
    assert httpx.get(f"http://{mesh.http_address}/readyz").status_code == 200
