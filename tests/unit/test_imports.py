"""Who may import what, and that importing does nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.sizes import ROOT

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
NAMES = [contract["name"] for contract in CONTRACTS]
IMPORT_ROOTS = ("protos/gen", "services", "gateway")
HEAVY = {"torch", "diffusers", "transformers"}

# Of each contract, an import that breaks it and no other.
OFFENCES = {
    "Who may import what": ("services/imagemesh_runtime/limits.py", "imagemesh_models"),
    "Services never import each other": (
        "services/imagemesh_services/vae/config.py",
        "imagemesh_services.vit.config",
    ),
    "The gateway imports no service and no torch": ("gateway/imagemesh_gateway/config.py", "torch"),
    "The client knows only the contracts and the runtime's tensors, client and errors": (
        "gateway/imagemesh_client/types.py",
        "imagemesh_runtime.limits",
    ),
    "Only torch backends import torch": ("services/imagemesh_services/vae/servicer.py", "torch"),
}


def broken_contracts(root: Path) -> list[str]:
    """What lint-imports says of the packages in ``root``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / part) for part in IMPORT_ROOTS)}
    lint = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(lint, cwd=root, env=environment, capture_output=True, text=True, check=False)
    verdicts = dict(re.findall(r"^(.+?) *(KEPT|BROKEN)$", done.stdout, re.MULTILINE))
    assert sorted(verdicts) == sorted(NAMES), done.stdout + done.stderr
    broken = [name for name, verdict in verdicts.items() if verdict == "BROKEN"]
    assert bool(broken) == (done.returncode != 0)
    return broken


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code, to break."""
    copy = tmp_path_factory.mktemp("house")
    for part in IMPORT_ROOTS:
        only_code = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json", "*.png")
        shutil.copytree(ROOT / part, copy / part, ignore=only_code)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def test_the_import_contracts_hold():
    assert broken_contracts(ROOT) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_import_against_a_contract_would_break_it(house: Path, name: str):
    file, module = OFFENCES[name]
    path = house / file
    kept = path.read_text()
    path.write_text(f"{kept}\nimport {module}\n")
    try:
        assert broken_contracts(house) == [name]
    finally:
        path.write_text(kept)


def test_the_clients_contract_knows_every_module_of_the_runtime():
    (contract,) = (contract for contract in CONTRACTS if contract.get("source_modules") == ["imagemesh_client"])
    allowed = {f"imagemesh_runtime.{name}" for name in ("tensors", "client", "errors")}
    assert {*contract["forbidden_modules"], *allowed, "imagemesh_runtime"} == set(modules_of("imagemesh_runtime"))


# Imports the modules named on stdin and tells what that did; what a library reads or starts for itself is its own.
PROBE = """
import json, os, sys, threading
roots, libraries, modules = json.load(sys.stdin)
import importlib
for name in libraries:
    importlib.import_module(name)
found = []
def ours(what):
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename in (os.__file__, "<string>", "<frozen os>", "<frozen _collections_abc>"):
        frame = frame.f_back
    if frame and frame.f_code.co_filename.startswith(tuple(roots)):
        found.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {what}")
class Spy(type(os.environ)):
    def __getitem__(self, key):
        ours(f"reads {key}")
        return super().__getitem__(key)
    def __iter__(self):
        ours("reads the environment")
        return super().__iter__()
old = os.environ
os.environ = Spy(old._data, old.encodekey, old.decodekey, old.encodevalue, old.decodevalue)
def spied(module, name):
    original = getattr(module, name)
    def spy(*args, **kwargs):
        ours(f"asks {name}")
        return original(*args, **kwargs)
    setattr(module, name, spy)
spied(os, "cpu_count")
spied(os, "sched_getaffinity")
if "torch" in libraries:
    import torch
    spied(torch.cuda, "is_available")
    spied(torch.cuda, "device_count")
    spied(torch, "set_num_threads")
before = threading.active_count()
for name in modules:
    importlib.import_module(name)
json.dump({
    "found": found,
    "threads": threading.active_count() - before,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "loggers": len(__import__("logging").getLogger().handlers),
}, sys.stdout)
"""


def probe(modules: list[str], libraries: tuple[str, ...] = ()) -> dict:
    """Import the modules in a process of its own whose environment is empty."""
    roots = [str(ROOT / part) for part in IMPORT_ROOTS]
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps([roots, libraries, modules]), env={}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def modules_of(*packages: str) -> list[str]:
    """Every module of the packages, by name."""
    found = []
    for part in IMPORT_ROOTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            parts = path.relative_to(ROOT / part).with_suffix("").parts
            if parts[0] in packages:
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


LIGHT = ("imagemesh", "imagemesh_runtime", "imagemesh_models", "imagemesh_gateway", "imagemesh_client", "imagemesh_cli")
ALL_OF_SERVICES = modules_of("imagemesh_services")
# Engines that run graphs have torch do all around them; classifiers' graphs, which are made beforehand, need none.
_TORCH = re.compile(r"\.torch(_support)?(\.|$)|\.(?!vit)\w+\.backends\.(onnxruntime|openvino)$")
WITH_TORCH = [name for name in ALL_OF_SERVICES if _TORCH.search(name)]
SERVICES = ("text_encoder", "diffusion", "vae", "controlnet", "vit")
NONE_SET = {"found": [], "threads": 0, "loggers": 0}


def test_gateway_client_command_and_runtime_import_no_torch_and_no_service():
    modules = modules_of(*LIGHT)
    assert len(modules) > 50
    told = probe(modules)
    assert HEAVY & set(told["modules"]) == set()
    assert not {"imagemesh_services", "imagemesh_training"} & set(told["modules"])


def test_of_the_services_only_the_torch_backends_import_torch():
    modules = [name for name in ALL_OF_SERVICES if name not in WITH_TORCH]
    assert {name.split(".")[1] for name in WITH_TORCH} == {*SERVICES, "torch_support", "graphs"}
    assert HEAVY & set(probe(modules)["modules"]) == set()


def test_importing_reads_no_environment_and_starts_nothing():
    told = probe([name for name in modules_of(*LIGHT, "imagemesh_services") if name not in WITH_TORCH])
    assert {key: told[key] for key in NONE_SET} == NONE_SET


def test_importing_the_torch_backends_probes_no_hardware():
    libraries = ("torch", "transformers", "diffusers", "diffusers.modular_pipelines")
    told = probe(WITH_TORCH, libraries)
    assert {key: told[key] for key in ("found", "threads")} == {"found": [], "threads": 0}


def test_reading_the_environment_at_import_would_be_told(tmp_path: Path):
    reader = tmp_path / "reader.py"
    reader.write_text("import os\nos.environ.get('HOME')\nos.getenv('HOME')\nos.cpu_count()\n'HOME' in os.environ\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROBE}"
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps([[str(tmp_path)], [], ["reader"]]), env={},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = [line.rpartition(":")[2] for line in json.loads(done.stdout)["found"]]
    assert told == ["2 reads HOME", "3 reads HOME", "4 asks cpu_count", "5 reads HOME"]
