"""Write what is drawn of the metrics and the rules' wrapping: Grafana's dashboards and the operator's PrometheusRule.

``python deploy/monitoring.py`` writes ``deploy/grafana/dashboards/*.json`` and ``k8s/components/monitoring/rules.yaml``
from the tables below and ``deploy/prometheus/rules.yaml``.
"""

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent

# A panel: title, unit, (legend, query) of each line.
Panel = tuple[str, str, list[tuple[str, str]]]


def _rate(metric: str, by: str = "service", **labels: str) -> str:
    chosen = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"sum by ({by}) (rate({metric}{{{chosen}}}[$__rate_interval]))"


def _quantile(q: float, metric: str, by: str = "service") -> str:
    return f"histogram_quantile({q}, sum by ({by}, le) (rate({metric}_bucket[$__rate_interval])))"


MESH: list[Panel] = [
    ("Calls", "reqps", [("{{grpc_method}}", _rate("grpc_server_handled_total", "grpc_method"))]),
    ("Calls that fail", "percentunit", [("{{grpc_service}}", "imagemesh:errors:ratio_rate5m")]),
    ("HTTP", "reqps", [("{{path}} {{code}}", _rate("http_requests_total", "path, code"))]),
    ("HTTP, 95th percentile", "s", [("{{path}}", _quantile(0.95, "http_request_duration_seconds", "path"))]),
    ("Replicas that are ready", "none", [("{{peer}}", "max by (peer) (imagemesh_ready_replicas)")]),
    ("Waiting for the device", "none", [("{{service}}", "sum by (service) (imagemesh_pending_requests)")]),
    ("Jobs in the gateway's store", "none", [("{{model}}", "sum by (model) (imagemesh_waiting_jobs)")]),
    ("In work", "none", [("{{service}}", "sum by (service) (imagemesh_running_requests)")]),
    ("Wait for the device, 95th percentile", "s", [("{{service}}", "imagemesh:queue_wait_seconds:p95_rate5m")]),
    ("Turned away at the door", "reqps", [("{{code}}", _rate("imagemesh_refused_calls_total", "code"))]),
    ("Given up by callers", "reqps", [("{{service}}", _rate("imagemesh_cancelled_requests_total"))]),
    ("Tensors moved", "Bps", [
        ("{{service}} {{path}} {{direction}}", _rate("imagemesh_transport_bytes_total", "service, path, direction")),
    ]),
]  # fmt: skip
DEVICES: list[Panel] = [
    ("Backlog", "s", [("{{queue}} {{instance}}", "imagemesh_backlog_seconds"),
                      ("{{queue}}, all", "imagemesh:backlog_seconds:sum")]),
    ("One forward, median", "s", [("{{service}}", _quantile(0.5, "imagemesh_step_seconds"))]),
    ("Rows computed together, mean", "none", [
        ("{{service}}", f"{_rate('imagemesh_batch_size_sum')} / {_rate('imagemesh_batch_size_count')}"),
    ]),
    ("A stage, 95th percentile", "s", [
        ("{{service}} {{stage}}", _quantile(0.95, "imagemesh_stage_seconds", "service, stage")),
    ]),
    ("Loading a model", "s", [("{{model}}", _quantile(0.95, "imagemesh_model_load_seconds", "model"))]),
    ("Waits for residuals, 95th percentile", "s", [
        ("{{where}}", _quantile(0.95, "imagemesh_control_stall_seconds", "where")),
    ]),
    ("Residuals", "Bps", [("{{service}}", _rate("imagemesh_control_bytes_total"))]),
    ("Replicas passed over", "none", [
        ("{{service}} {{peer}}", "sum by (service, peer) (increase(imagemesh_passed_over_total[$__range]))"),
    ]),
    ("Generations that moved", "none", [("", "sum(increase(imagemesh_moved_generations_total[$__range]))")]),
    ("Devices that hang", "none", [("{{instance}}", "imagemesh_lane_hangs"),
                                   ("times", "sum(imagemesh_lane_hung_total)")]),
    ("Kept embeddings", "bytes", [("{{instance}}", "imagemesh_embedding_cache_bytes")]),
    ("Embeddings found", "percentunit", [
        ("", f"{_rate('imagemesh_embedding_cache_lookups_total', outcome='hit')} / "
             f"{_rate('imagemesh_embedding_cache_lookups_total')}"),
    ]),
]  # fmt: skip


def dashboard(title: str, panels: list[Panel]) -> dict[str, Any]:
    """Grafana's model of a dashboard, two panels a row."""
    source = {"type": "prometheus", "uid": "prometheus"}
    return {
        "uid": title.lower().replace(" ", "-"),
        "title": title,
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": name,
                "datasource": source,
                "gridPos": {"x": number % 2 * 12, "y": number // 2 * 8, "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + i), "expr": query, "legendFormat": legend}
                    for i, (legend, query) in enumerate(lines)
                ],
            }
            for number, (name, unit, lines) in enumerate(panels)
        ],
    }


def files() -> dict[Path, str]:
    """What is written, by path."""
    folder = ROOT / "deploy" / "grafana" / "dashboards"
    drawn = {"mesh": dashboard("imagemesh", MESH), "devices": dashboard("imagemesh devices", DEVICES)}
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())
    wrapped = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "imagemesh"},
        "spec": rules,
    }
    text = "# Written by deploy/monitoring.py from deploy/prometheus/rules.yaml; don't edit.\n"
    return {
        **{folder / f"{name}.json": json.dumps(one, indent=1) + "\n" for name, one in drawn.items()},
        ROOT / "k8s" / "components" / "monitoring" / "rules.yaml": text + yaml.safe_dump(wrapped, sort_keys=False),
    }


def main() -> None:
    """Write them."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
