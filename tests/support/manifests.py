"""Kubernetes manifests as kustomize renders them, and what is asked of them."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from cloudcoil.models.cert_manager.v1 import Certificate, Issuer
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tests.support.sizes import ROOT

KUBECTL = Path(sys.executable).parent / "kubectl"
K8S = ROOT / "k8s"
COMBINATIONS = sorted(path.parent for path in [*K8S.glob("overlays/*/*"), *K8S.glob("tests/*/*")])
VERSION = "1.34"
CUSTOM = {
    "Certificate": Certificate, "Issuer": Issuer, "PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule,
    "ScaledObject": ScaledObject,
}  # fmt: skip
# Their schemas are no package of Python's: tests/full/test_gateway_api.py holds them to those of npm's.
ELSEWHERE = {"Gateway", "GRPCRoute", "HTTPRoute"}

Object = Mapping[str, Any]


@functools.cache
def render(folder: Path) -> tuple[Object, ...]:
    """All objects of a kustomization; a warning is an error."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), f"{folder}: {done.stderr}"
    return tuple(yaml.safe_load_all(done.stdout))


def find(objects: tuple[Object, ...], *kinds: str) -> Iterator[Object]:
    """Those of some kinds."""
    return (one for one in objects if one["kind"] in kinds)


def templates(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Every pod template, by the name of what makes its pods."""
    for one in find(objects, "Deployment", "StatefulSet", "Job"):
        yield one["metadata"]["name"], one["spec"]["template"]


def containers(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Every container, by name."""
    for _, template in templates(objects):
        for one in template["spec"]["containers"]:
            yield one["name"], one


def environment(container: Object) -> dict[str, str]:
    """A container's variables."""
    return {one["name"]: one["value"] for one in container.get("env", [])}


def check(one: Object) -> None:
    """Hold an object to the schema of its kind, where what the schema doesn't know is wrong.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: it is not valid.
    """
    _check(json.dumps(one, sort_keys=True))


@functools.cache  # most of what combinations hold is the same
def _check(text: str) -> None:
    one = json.loads(text)
    if one["kind"] in ELSEWHERE:
        return
    if one["kind"] in CUSTOM:
        _closed(one["kind"]).validate(one)
    else:
        kubernetes_validate.validate(one, VERSION, strict=True)


@functools.cache
def _closed(kind: str) -> jsonschema.Draft202012Validator:
    """Holds to the kind's schema, in which an object with named properties has no others."""
    schema = json.loads(json.dumps(CUSTOM[kind].model_json_schema(by_alias=True)))

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node and node.get("type") == "object":
                node.setdefault("additionalProperties", False)
            for value in node.values():
                close(value)
        elif isinstance(node, list):
            for value in node:
                close(value)

    if kind == "ScaledObject":  # KEDA 2.17 added it; the newest schema for this Python is 2.16's
        behaviors = ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]
        schema["$defs"]["Fallback"]["properties"]["behavior"] = {"enum": behaviors}
    close(schema)
    return jsonschema.Draft202012Validator(schema)
