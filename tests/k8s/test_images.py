"""The images: what the Dockerfile says holds, and its commands do what they should, in a plain directory."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from imagemesh_cli.rooms import SERVICES
from tests.support.dockerfile import DOCKER, DOCKERFILE, STAGES, commands, stage
from tests.support.sizes import ROOT

ROOMS = ("gateway", *SERVICES)
PIN = re.compile(r"^([a-z0-9._-]+)==(\S+)", re.IGNORECASE | re.MULTILINE)


def pins(lock: str) -> dict[str, str]:
    return dict(PIN.findall((DOCKER / "locks" / f"{lock}.txt").read_text()))


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("service", ROOMS)
def test_every_service_has_its_libraries(service: str) -> None:
    (base,) = [
        base
        for base, name in STAGES
        if name == ("gateway-libraries" if service == "gateway" else f"libraries-{service}")
    ]
    assert base == ("${PYTHON}" if service == "gateway" else "worker-libraries")


def test_it_runs_as_nobody_who_is_anybody() -> None:
    assert STAGES[-1][1] == "run", "the default target is what runs"
    (user,) = re.findall(r"^USER (\d+):(\d+)$", stage("run"), re.MULTILINE)
    assert min(map(int, user)) >= 10000


@pytest.mark.parametrize(("lock", "extras"), [("gateway", ["gateway"]), ("worker", ["torch", "search"])])
def test_the_locks_hold_what_the_project_wants(lock: str, extras: list[str]) -> None:
    locked = pins(lock) | (pins("torch-cuda") if lock == "worker" else {})
    versions = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    for wanted in requirements(*extras):
        name = wanted.name.lower().replace("_", "-")
        assert wanted.specifier.contains(versions[name]), f"deploy/docker/lock.py would renew {name}"


@pytest.mark.parametrize("path", sorted((DOCKER / "locks").glob("*.txt")), ids=lambda path: path.stem)
def test_every_package_is_locked_with_its_hash(path: Path) -> None:
    blocks = re.split(r"\n(?=[a-z])", path.read_text().partition("\n")[2])
    assert len(blocks) == len(pins(path.stem)) > 0
    assert [block for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", block)] == []


def test_the_gateway_has_no_torch_and_no_build_of_torch_is_mixed_with_another() -> None:
    assert {"torch", "diffusers", "transformers"} & set(pins("gateway")) == set()
    assert [name for name in pins("worker") if name == "torch" or name.startswith(("nvidia", "cuda"))] == []
    assert set(pins("torch-cpu")) == {"torch"}
    assert pins("torch-cpu")["torch"].partition("+")[0] == pins("torch-cuda")["torch"]


def test_what_is_copied_is_sent_to_the_builder_and_the_rest_is_not() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for copied in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in copied.split()[:-1]:
            assert any(source == root or source.startswith(f"{root}/") for root in allowed), source
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_what_the_gateway_is_locked_to_can_be_had_with_those_hashes(tmp_path: Path) -> None:
    """The whole of the stages' commands is run by the long tests."""
    (command,) = commands("gateway-libraries", tmp_path)
    install = command.partition("&&")[2].replace(
        f"{tmp_path}/opt/imagemesh/bin/pip install", "-m pip install --dry-run"
    )
    quick = install.replace("--no-cache-dir", "--ignore-installed --no-deps --quiet").split()
    done = subprocess.run([sys.executable, *quick], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compose() -> dict[str, dict[str, object]]:
    services: dict[str, dict[str, object]] = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())[
        "services"
    ]
    return services


def test_compose_runs_every_service_apart_and_confined() -> None:
    services = compose()
    assert set(ROOMS) <= set(services)
    for name in ROOMS:
        one = services[name]
        assert one["build"]["args"]["SERVICE"] == name  # type: ignore[index]
        assert one["read_only"] is True
        assert one["cap_drop"] == ["ALL"]
        assert "sockets:/tmp" in one["volumes"]  # type: ignore[operator]


@pytest.mark.parametrize("path", ["prometheus/prometheus.yml", "otel/collector.yaml"])
def test_what_reads_metrics_reads_every_service(path: str) -> None:
    found = re.findall(r"([a-z-]+):9464", (ROOT / "deploy" / path).read_text())
    assert sorted(found) == sorted(ROOMS)
