"""Whatever a rule, a dashboard, an autoscaler or an adapter asks for is exported by the running mesh."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy import monitoring
from tests.support.manifests import COMBINATIONS, K8S, find, render
from tests.support.mesh import running_mesh
from tests.support.sizes import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
NAME = re.compile(r"\b(?:imagemesh_[a-z_]+|grpc_server_[a-z_]+|http_request[a-z_]+|imagemesh:[a-z0-9_:]+)\b")
LABEL = re.compile(r"\b(imagemesh_[a-z_]+|grpc_server_[a-z_]+)\{([^}]*)\}")


@pytest.fixture(scope="module")
def exported() -> Iterator[dict[str, set[str]]]:
    """The names of all series of a mesh, and of each series its labels."""
    found: dict[str, set[str]] = {}
    with running_mesh(backend="fake") as mesh:
        servers = {**mesh.services, "gateway": mesh.gateway}
        httpx.get(f"http://{mesh.http_address}/readyz")
        for server in servers.values():
            text = httpx.get(f"http://{server.metrics_http.address}/metrics").text
            for family in text_string_to_metric_families(text):
                if family.name.endswith("_created"):  # when a series began, which nothing asks for
                    continue
                kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
                for end in kinds.get(family.type, ("",)):
                    labels = {key for one in family.samples for key in one.labels}
                    found.setdefault(family.name + end, set()).update(labels)
    return found


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Every query, by what asks it."""
    found = {rule.get("alert", rule.get("record", "")): rule["expr"] for rule in rules()}
    for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            found |= {f"{path.stem}: {panel['title']} {one['refId']}": one["expr"] for one in panel["targets"]}
    for one in find(render(K8S / "overlays" / "prod"), "ScaledObject"):
        for trigger in one["spec"]["triggers"]:
            found[f"ScaledObject {one['metadata']['name']}"] = trigger["metadata"]["query"]
    for one in find(render(K8S / "tests" / "hpa-mixed"), "HorizontalPodAutoscaler"):
        for metric in one["spec"]["metrics"]:
            asked = asks(metric)["metric"]
            chosen = ",".join(
                f'{key}="{value}"' for key, value in asked.get("selector", {}).get("matchLabels", {}).items()
            )
            found[f"HPA {one['metadata']['name']}"] = asked["name"] + (f"{{{chosen}}}" if chosen else "")
    return found


def asks(metric: Any) -> Any:
    """What an autoscaler's metric is about: the pods that it scales, or the namespace."""
    return metric[metric["type"].lower()]


def test_every_name_in_a_query_is_exported_or_recorded(exported: dict[str, set[str]]) -> None:
    known = set(exported) | {rule["record"] for rule in rules() if "record" in rule}
    for who, query in queries().items():
        names = set(NAME.findall(query))
        assert names, f"{who} asks for nothing of the mesh: {query}"
        assert names <= known, f"{who} asks for {names - known}"


def test_every_metric_of_the_mesh_is_asked_for(exported: dict[str, set[str]]) -> None:
    asked = {name for query in queries().values() for name in NAME.findall(query)}
    asked = {re.sub(r"(_bucket|_sum|_count)$", "", name) for name in asked}
    # Counted for whoever looks at one call; the rest of gRPC's usual names says as much.
    beside = {
        "grpc_server_started_total",
        "grpc_server_msg_received_total",
        "grpc_server_msg_sent_total",
        "grpc_server_handling_seconds",
    }
    ours = {
        re.sub(r"(_bucket|_sum|_count)$", "", name)
        for name in exported
        if name.startswith(("imagemesh_", "grpc_", "http_"))
    }
    assert ours - beside - asked == set()


def test_labels_that_queries_choose_by_are_there(exported: dict[str, set[str]]) -> None:
    for who, query in queries().items():
        for name, chosen in LABEL.findall(query):
            labels = set(re.findall(r"([a-z_]+)\s*[=!]", chosen)) - {"namespace"}  # which Prometheus adds
            if exported.get(name):  # a counter of calls has no series before the first
                assert labels <= exported[name], f"{who}: {name} has {exported[name]}"


def test_what_is_generated_is_what_is_committed() -> None:
    for path, text in monitoring.files().items():
        assert path.read_text() == text, f"python deploy/monitoring.py writes {path.name} anew"


def test_the_adapter_serves_what_the_autoscalers_read() -> None:
    adapter = yaml.safe_load((PROMETHEUS / "adapter.yaml").read_text())
    served = {}
    for kind, (rule,) in {"Pods": adapter["rules"], "External": adapter["externalRules"]}.items():
        served[kind] = re.compile(re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])[1])  # type: ignore[index]
    for one in find(render(K8S / "tests" / "hpa-mixed"), "HorizontalPodAutoscaler"):
        for metric in one["spec"]["metrics"]:
            assert served[metric["type"]].fullmatch(asks(metric)["metric"]["name"])


def test_keda_and_the_hpa_agree_on_targets_and_every_query_answers_one_number() -> None:
    keda = {
        one["metadata"]["name"]: one["spec"]["triggers"]
        for one in find(render(K8S / "overlays" / "prod"), "ScaledObject")
    }
    hpas = {
        one["metadata"]["name"]: one["spec"]["metrics"]
        for one in find(render(K8S / "tests" / "hpa-mixed"), "HorizontalPodAutoscaler")
    }
    assert set(keda) == set(hpas)
    for name, (trigger,) in keda.items():
        (metric,) = hpas[name]
        assert trigger["metadata"]["threshold"] == asks(metric)["target"]["averageValue"]
        query = re.fullmatch(
            r'sum\(([a-z_]+)\{[a-z]+="[a-z-]+",namespace="imagemesh"\}\)', trigger["metadata"]["query"]
        )
        assert query is not None
        assert query[1] == asks(metric)["metric"]["name"]


def test_keda_asks_for_its_own_namespace_however_that_is_called(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "prod"
    text = (overlay / "kustomization.yaml").read_text().replace("namespace: imagemesh", "namespace: staging")
    (overlay / "kustomization.yaml").write_text(text)
    found = list(find(render(overlay), "ScaledObject"))
    assert found
    for one in found:
        assert one["metadata"]["namespace"] == "staging"
        for trigger in one["spec"]["triggers"]:
            assert 'namespace="staging"' in trigger["metadata"]["query"]


def promtool(*arguments: object) -> str:
    tool = shutil.which("promtool")
    assert tool, "promtool comes with Debian's prometheus, which .ci/run installs"
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_fire_when_they_should_and_no_sooner() -> None:
    assert "SUCCESS" in promtool("test", "rules", PROMETHEUS / "rules_test.yaml")


def test_every_alert_has_a_test() -> None:
    tested = (PROMETHEUS / "rules_test.yaml").read_text()
    assert [rule["alert"] for rule in rules() if "alert" in rule and f"alertname: {rule['alert']}" not in tested] == []


def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_no_combination_asks_prometheus_for_something_else() -> None:
    allowed = set(queries().values())
    for folder in COMBINATIONS:
        for one in find(render(folder), "ScaledObject"):
            assert {trigger["metadata"]["query"] for trigger in one["spec"]["triggers"]} <= allowed
