"""The house keeps its shape: what lies where, and which doors every room has."""

import ast
import filecmp
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import imagemesh_client
from imagemesh_cli.rooms import SERVICES
from imagemesh_client import AsyncClient, Client
from imagemesh_client.aio_jobs import AsyncJobs
from imagemesh_client.search import AsyncIndexes
from imagemesh_client.sync_jobs import Jobs
from imagemesh_client.sync_search import Indexes
from tests.support import sizes
from tests.support.sizes import ROOT

FOLDERS = {"protos", "services", "gateway", "deploy", "k8s", "tests", "docs", ".ci"}
FILES = {"pyproject.toml", "Makefile", "README.md", "LICENSE", ".gitignore", ".dockerignore"}
DOORS = {"__init__.py", "__main__.py", "backend.py", "config.py", "service.py", "servicer.py", "backends"}
ROOMS = [ROOT / "services" / room.package.replace(".", "/") for room in SERVICES.values()]
SHARED = "graphs"  # beside the rooms: what runs a module of any of them
rooms = pytest.mark.parametrize("room", ROOMS, ids=[room.name for room in ROOMS])
PROTOS = sorted((ROOT / "protos" / "imagemesh" / "v1").glob("*.proto"))


def git_files(*arguments: str) -> list[str]:
    command = ["git", "ls-files", "-z", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]


def test_the_top_level_holds_what_the_design_says_and_nothing_else():
    found = {Path(file).parts[0] for file in git_files("--cached", "--others", "--exclude-standard")}
    assert found - FOLDERS - FILES == set()
    assert FILES - found == set()


def test_no_file_that_git_ignores_is_committed():
    assert git_files("--cached", "--ignored", "--exclude-standard") == []


def test_every_service_is_a_room():
    folders = {path.parent for path in (ROOT / "services" / "imagemesh_services").glob("*/__init__.py")}
    assert folders == {*ROOMS, ROOT / "services" / "imagemesh_services" / SHARED}


@rooms
def test_every_room_has_the_same_doors(room: Path):
    assert {path.name for path in room.iterdir()} >= DOORS


@rooms
def test_every_backend_is_a_file_or_a_package_and_a_row(room: Path):
    table = importlib.import_module(f"imagemesh_services.{room.name}.backend").BACKENDS
    found = {path.stem for path in (room / "backends").glob("*.py")} - {"__init__"}
    found |= {path.parent.name for path in (room / "backends").glob("*/__init__.py")}
    assert set(table) == found
    for name, entry in table.items():
        assert entry.target.startswith(f"imagemesh_services.{room.name}.backends.{name}:")
        assert entry.explicit == (name == "fake")


def test_every_service_has_a_proto_of_its_own():
    others = {"gateway", "job", "load", "model", "model_loading", "preprocess", "reference", "search", "transport"}
    names = {room.name for room in ROOMS} | others
    assert {path.stem for path in PROTOS if path.stem.endswith("_service")} == {f"{name}_service" for name in names}


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_services_methods_and_enums_are_documented(proto: Path):
    lines = proto.read_text().splitlines()
    bare = [
        line.strip()
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\s*(service|rpc|enum) ", line) and not before.lstrip().startswith("//")
    ]
    assert bare == []


def test_the_generated_code_is_what_the_protos_make(tmp_path: Path):
    out = tmp_path / "gen"
    command = [sys.executable, str(ROOT / "protos" / "generate.py"), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    committed = {path.removeprefix("protos/gen/") for path in git_files("protos/gen")}
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert made == committed
    _, different, failed = filecmp.cmpfiles(out, ROOT / "protos" / "gen", made, shallow=False)
    assert (different, failed) == ([], [])


def test_files_and_functions_are_short(capsys: pytest.CaptureFixture[str]):
    assert sizes.main() == 0, capsys.readouterr().out


def test_a_long_file_or_function_would_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "long.py").write_text("def f():\n" + "    pass\n" * 40 + "\n" * 400)
    assert sizes.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "services/long.py: 441 lines, at most 400",
        "services/long.py:1: f has 41 lines, at most 40",
    ]


def test_every_module_says_what_it_is_for():
    files = [ROOT / file for file in git_files("services/*.py", "gateway/*.py", "deploy/*.py")]
    assert [file for file in files if not ast.get_docstring(ast.parse(file.read_text()))] == []


PUBLIC = [
    "AsyncClient", "Choice", "Classification", "Classify", "Client", "Clustering", "Control", "ControlSavings",
    "DeadlineExceeded",
    "Duplicate", "Embed", "EmbedOptions", "Embeddings", "Event", "GenerateOptions",
    "GeneratedImage", "Generation", "Group", "Hires", "ImageInput", "Index", "InvalidArgument", "Job",
    "JobFailure", "JobOptions",
    "Keep", "Match", "MeshError", "Model", "Models", "Parameters", "Prediction", "Preprocessed", "Preprocessor",
    "PreprocessorParameter", "Progress", "Queued", "Reference", "RejectedImage", "RemoteError", "Result",
    "Sampling", "Timing", "Unavailable",
]  # fmt: skip


def test_the_clients_public_names_are_these():
    assert imagemesh_client.__all__ == PUBLIC
    assert [name for name in PUBLIC if not hasattr(imagemesh_client, name)] == []


def test_both_clients_have_the_same_methods():
    sync, aio = ({name for name in dir(cls) if not name.startswith("_")} for cls in (Client, AsyncClient))
    vision = {"classify", "classify_stream", "embed", "embed_stream"}
    control = {"preprocess", "preprocessors"}
    loading = {"load_model", "unload_model"}
    assert sync == aio == vision | control | loading | {"close", "generate", "models", "sampling", "stream"}


def test_the_jobs_of_both_clients_have_the_same_methods():
    sync, aio = ({name for name in dir(cls) if not name.startswith("_")} for cls in (Jobs, AsyncJobs))
    assert sync == aio == {"cancel", "create", "get", "list", "wait", "watch"}


def test_the_indexes_of_both_clients_have_the_same_methods():
    sync, aio = ({name for name in dir(cls) if not name.startswith("_")} for cls in (Indexes, AsyncIndexes))
    assert sync == aio == {"add", "clusters", "delete", "duplicates", "export", "list", "remove", "search", "vectors"}
