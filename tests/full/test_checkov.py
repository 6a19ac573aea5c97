"""checkov finds nothing in any combination of the manifests but what is waived with a reason; no waiver is idle."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.manifests import COMBINATIONS, K8S, render
from tests.support.tools import tool

WAIVED = set(yaml.safe_load((K8S / "checkov.yaml").read_text())["skip-check"])


@pytest.mark.timeout(2400)
def test_what_checkov_finds_is_waived_and_each_waiver_is_needed(tmp_path: Path) -> None:
    for folder in COMBINATIONS:
        (tmp_path / f"{folder.name}.yaml").write_text(yaml.safe_dump_all(render(folder)))
    command = [
        tool("checkov", "checkov==3.3.30"),
        "--skip-download",
        "--framework",
        "kubernetes",
        "--directory",
        tmp_path,
        "--output",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 1000
    found = {one["check_id"]: one for one in report["results"]["failed_checks"]}
    assert {check: (one["check_name"], one["resource"]) for check, one in found.items() if check not in WAIVED} == {}
    assert set(found) == WAIVED, "a waiver that is not needed"
