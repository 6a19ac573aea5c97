"""The commands about jobs, against a mesh."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from imagemesh_cli.main import main
from tests.support.mesh import running_mesh

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def mesh() -> Iterator[str]:
    with running_mesh({"max_running_jobs": "1"}, backend="fake") as host:
        yield host.grpc_address


@pytest.fixture
def run(mesh: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``imagemesh jobs`` against the mesh; answers exit code, stdout and stderr."""
    monkeypatch.setenv("IMAGEMESH_SERVER", mesh)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main(["jobs", *map(str, arguments)])
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capfd.readouterr()

    return call


def test_a_job_is_made_watched_and_written(run: Run, tmp_path: Path) -> None:
    code, created, _ = run("create", "two foxes", "--steps", 3, "--seed", 7, "-n", 2)
    assert code == 0
    job = created.strip()
    code, told, _ = run("watch", job, "-o", tmp_path / "fox.png")
    assert code == 0
    assert "fox-1.png: seed 8, 64x64, 3 steps" in told
    assert Image.open(tmp_path / "fox-0.png").size == (64, 64)
    assert run("watch", job) == (0, f"{job}: succeeded, 2 pictures\n", "")
    listed = json.loads(run("list", "--json", "--state", "succeeded", "--limit", 1)[1])["jobs"]
    assert [(one["id"], one["state"], one["prompt"], one["attempts"]) for one in listed] == [
        (job, "succeeded", "two foxes", 1)
    ]


def test_the_list_tells_how_far_each_is(run: Run) -> None:
    long = run("create", "x" * 50, "--steps", 1000, "--size", "1024x1024")[1].strip()
    waiting = run("create", "waits", "--steps", 2)[1].strip()
    table = run("list", "--state", "queued", "--state", "running")[1]
    assert table.splitlines()[0].split() == ["ID", "STATE", "CREATED", "PROMPT"]
    assert f"{waiting}  queued" in table
    assert "ahead" in table
    assert "x" * 37 + "..." in table
    for job in (waiting, long):
        assert run("cancel", job)[1] == f"{job}: cancelled\n"
    assert run("watch", long) == (1, "", f"imagemesh: job {long}: it was cancelled\n")


def test_the_same_key_is_the_same_job(run: Run) -> None:
    first, second = (run("create", "once", "--steps", 2, "--seed", 1, "--key", "k")[1] for _ in range(2))
    assert first == second


def test_an_unknown_job_is_a_mistake_in_the_command(run: Run) -> None:
    assert run("cancel", "nothing") == (2, "", "imagemesh: job 'nothing' not found; it may have expired\n")
    assert run("list", "--state", "lost")[0] == 2
