"""checkov finds nothing in any combination of the manifests but what is waived with a reason; no waiver is idle."""

import json
import subprocess
import venv
from pathlib import Path

import pytest
import yaml

from tests.support.manifests import COMBINATIONS, K8S, render
from tests.support.sizes import ROOT

VERSION = "3.3.30"
WAIVED = set(yaml.safe_load((K8S / "checkov.yaml").read_text())["skip-check"])


@pytest.fixture(scope="module")
def checkov() -> Path:
    """In an environment of its own: what it depends on doesn't go with what imagemesh does. A minute or two, once."""
    folder = ROOT / ".tools" / "checkov"
    found = folder / "bin" / "checkov"
    if not found.exists():
        venv.create(folder, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"checkov=={VERSION}"]
        subprocess.run(pip, check=True, timeout=1800)
    return found


@pytest.mark.timeout(2400)
def test_what_checkov_finds_is_waived_and_each_waiver_is_needed(checkov: Path, tmp_path: Path) -> None:
    for folder in COMBINATIONS:
        (tmp_path / f"{folder.name}.yaml").write_text(yaml.safe_dump_all(render(folder)))
    command = [checkov, "--framework", "kubernetes", "--directory", tmp_path, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 1000
    found = {one["check_id"]: one for one in report["results"]["failed_checks"]}
    assert {check: (one["check_name"], one["resource"]) for check, one in found.items() if check not in WAIVED} == {}
    assert set(found) == WAIVED, "a waiver that is not needed"
