"""The Gateway API's objects are valid by its own schemas, as npm's @kubernetes-models has them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.manifests import ELSEWHERE, K8S, find, render
from tests.support.sizes import ROOT

PACKAGE = "@kubernetes-models/gateway-api"
VALIDATE = f"""
import * as models from "{PACKAGE}/gateway.networking.k8s.io/v1/index";
let text = "";
for await (const piece of process.stdin) text += piece;
const given = JSON.parse(text);
new models[given.kind](given).validate();
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    found = ROOT / ".tools" / "gateway-api"
    if not (found / "node_modules" / PACKAGE).exists():
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", found, f"{PACKAGE}@2.0.0"]
        subprocess.run(npm, check=True, timeout=600)
    (found / "validate.mjs").write_text(VALIDATE)
    return found


def validated(one: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["node", "validate.mjs"]
    return subprocess.run(command, cwd=folder, input=json.dumps(one), capture_output=True, text=True, timeout=60)


def test_its_objects_are_valid(folder: Path) -> None:
    objects = list(find(render(K8S / "tests" / "gateway-api"), *ELSEWHERE))
    assert {one["kind"] for one in objects} == ELSEWHERE
    for one in objects:
        done = validated(one, folder)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", [{"gatewayClassName": 3}, {"listeners": [{"name": "x", "port": 0}]}])
def test_what_is_wrong_would_be_found(folder: Path, change: dict[str, Any]) -> None:
    (gateway,) = find(render(K8S / "tests" / "gateway-api"), "Gateway")
    assert validated({**gateway, "spec": {**gateway["spec"], **change}}, folder).returncode != 0
