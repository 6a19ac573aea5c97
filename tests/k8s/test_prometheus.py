"""A real Prometheus scrapes a running mesh, takes our rules, and answers each autoscaler's question with one number."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.support.manifests import K8S, find, render
from tests.support.mesh import running_mesh
from tests.support.sizes import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def configuration(targets: list[str]) -> dict[str, Any]:
    """The shipped one, of shorter intervals, with the mesh's addresses and the label that Kubernetes' pods have."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules.yaml")]
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": targets, "labels": {"namespace": "imagemesh"}}]
    return config


def until(answer: Callable[[], Any]) -> Any:
    """The first answer that is one."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if found := answer():
                return found
        time.sleep(0.2)
    raise AssertionError("Prometheus does not answer as it should")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Its API, once it has scraped every service and evaluated every rule."""
    folder, address = tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{free_port()}"
    binary = shutil.which("prometheus")
    assert binary, "Debian's prometheus, which .ci/run installs"
    with running_mesh(backend="fake") as mesh:
        httpx.get(f"http://{mesh.http_address}/readyz")
        servers = [*mesh.services.values(), mesh.gateway]
        config = configuration([server.metrics_http.address for server in servers])
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with subprocess.Popen([*command, f"--web.listen-address={address}", "--log.level=error"]) as process:
            try:
                with httpx.Client(base_url=f"http://{address}/api/v1", timeout=10) as api:
                    until(lambda: len(ask(api, "up == 1")) == len(servers))
                    until(lambda: all(rule["lastEvaluation"] > "0001-01-02" for rule in rules(api)))
                    yield api
            finally:
                process.terminate()
                process.wait(timeout=30)


def ask(api: httpx.Client, query: str) -> list[Any]:
    found: list[Any] = api.get("/query", params={"query": query}).json()["data"]["result"]
    return found


def rules(api: httpx.Client) -> list[Any]:
    return [rule for group in api.get("/rules").json()["data"]["groups"] for rule in group["rules"]]


def test_every_question_of_keda_has_one_number_for_an_answer(prometheus: httpx.Client) -> None:
    scalers = list(find(render(K8S / "overlays" / "prod"), "ScaledObject"))
    assert scalers
    for one in scalers:
        for trigger in one["spec"]["triggers"]:
            (series,) = ask(prometheus, trigger["metadata"]["query"])
            assert series["metric"] == {}
            assert float(series["value"][1]) == 0


def test_the_samplers_and_the_gateway_both_have_a_share_in_the_backlog(prometheus: httpx.Client) -> None:
    series = ask(prometheus, 'imagemesh_backlog_seconds{queue="diffusion",namespace="imagemesh"}')
    assert len(series) == 2


def test_every_rule_is_evaluated_without_a_fault_and_none_fires_where_nothing_is_wrong(
    prometheus: httpx.Client,
) -> None:
    found = rules(prometheus)
    written = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    assert len(found) == sum(len(group["rules"]) for group in written)
    for rule in found:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
        assert rule.get("alerts", []) == [], rule["name"]
