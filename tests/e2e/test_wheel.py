"""A wheel of what is committed works where nothing else is: without extras as a client, with [all] as a mesh."""

import json
import os
import signal
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

from tests.support.mesh import running_mesh
from tests.support.sizes import ROOT

pytestmark = pytest.mark.timeout(900)

PACKAGES = (
    "protos/gen/imagemesh",
    "services/imagemesh_runtime",
    "services/imagemesh_services",
    "services/imagemesh_models",
    "services/imagemesh_training",
    "gateway/imagemesh_gateway",
    "gateway/imagemesh_client",
    "gateway/imagemesh_cli",
)


def run(*command: str | Path, **options: object) -> str:
    """The command's stdout; what it complained of is in the error."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return str(done.stdout)


def committed(pattern: str = ".") -> list[str]:
    return run("git", "-C", ROOT, "ls-tree", "-r", "--name-only", "HEAD", pattern).splitlines()


class Home:
    """A virtual environment in a folder far from the repository, and an environment with nothing of ours in it."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        self.bin = folder / "venv" / "bin"
        venv.create(folder / "venv", with_pip=True)
        kept = {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")}
        self.env = {**kept, "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)}

    def install(self, *requirements: str) -> None:
        """With pip as it is configured here: where torch's wheels come from is its affair."""
        run(self.bin / "python", "-m", "pip", "install", "--quiet", *requirements, cwd=self.work)

    def imagemesh(self, *arguments: str | Path) -> str:
        return run(self.bin / "imagemesh", *arguments, cwd=self.work, env=self.env)

    def has(self, module: str) -> bool:
        find = f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"
        return run(self.bin / "python", "-c", find, cwd=self.work, env=self.env) == "True\n"

    @contextmanager
    def mesh(self, *arguments: str | Path) -> Iterator[dict[str, str]]:
        """``imagemesh up``, which must end well when told to."""
        command = [str(self.bin / "imagemesh"), "up", "--json", "--grpc-port", "0", "--http-port", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command += [str(argument) for argument in arguments]
        with subprocess.Popen(command, cwd=self.work, env=self.env, **pipes) as process:
            try:
                told = process.stdout.readline()
                yield json.loads(told)
                process.send_signal(signal.SIGTERM)
                rest, complaints = process.communicate(timeout=60)
            finally:
                process.kill()
        assert (process.returncode, rest, complaints) == (0, "", "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, folder / "clone")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", folder / "clone")
    (made,) = (folder / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """With the wheel installed without extras."""
    home = Home(tmp_path_factory.mktemp("home"))
    home.install(str(wheel))
    return home


@pytest.fixture(scope="module")
def full_home(home: Home, wheel: Path) -> Home:
    """The same with all services; from here on torch is there."""
    home.install(f"{wheel}[all]")
    return home


def test_the_wheel_holds_every_committed_file_of_the_packages_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {str(Path(file).relative_to(Path(package).parent)) for package in PACKAGES for file in committed(package)}
    assert names == wanted


def test_without_extras_it_is_a_client(home: Home):
    assert not home.has("torch")
    assert not home.has("fastapi")
    assert "generate" in home.imagemesh("--help")
    with running_mesh(backend="fake") as mesh:
        models = json.loads(home.imagemesh("models", "--server", mesh.grpc_address, "--json"))
        assert "fake" in home.imagemesh("models", "--server", mesh.grpc_address)
        home.imagemesh("generate", "hi", "-o", "hi.png", "--steps", "2", "--server", mesh.grpc_address)
        classes = home.imagemesh("classify", "hi.png", "--server", mesh.grpc_address, "--top-k", "1")
    assert sorted(model["role"] for model in models["models"]) == [
        "controlnet", "diffusion", "text-encoder", "vae", "vit",
    ]  # fmt: skip
    assert classes.startswith("hi.png: ")


def test_without_extras_up_says_what_to_install(home: Home):
    command = [str(home.bin / "imagemesh"), "up", "--grpc-port", "0", "--http-port", "0"]
    done = subprocess.run(command, cwd=home.work, env=home.env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "install" in done.stderr


def use(home: Home, told: dict[str, str]) -> list[str]:
    """Ask for everything that a newcomer would; the names of the models."""
    at = ("--server", told["grpc"])
    made = json.loads(home.imagemesh("generate", "a red cat", "-o", "cat.png", "--steps", "3", "--json", *at))
    with Image.open(home.work / "cat.png") as picture:
        assert picture.size == (made["parameters"]["width"], made["parameters"]["height"]) == (64, 64)
        assert max(high - low for low, high in picture.getextrema()) > 10
    assert set(made["parameters"]["backends"].values()) == {"torch"}
    (seen,) = json.loads(home.imagemesh("classify", "cat.png", "--top-k", "3", "--json", *at))
    assert len(seen["predictions"]) == 3
    with urlopen(f"http://{told['http']}/readyz") as answer:
        assert answer.status == 200
    listed = json.loads(home.imagemesh("models", "--json", *at))
    assert listed["unreachable"] == []
    return sorted({model["name"] for model in listed["models"]})


SHIPPED = sorted({Path(file).parts[2] for file in committed("services/imagemesh_models/") if file.endswith(".json")})
TINY = ["tiny-controlnet", "tiny-sd", "tiny-vit"]


@pytest.mark.parametrize("names", [TINY, SHIPPED] if SHIPPED else [TINY], ids="+".join)
def test_with_all_extras_it_is_a_mesh(full_home: Home, models: Path, names: list[str]):
    with full_home.mesh(*(("--models", models) if names == TINY else ())) as told:
        assert use(full_home, told) == names
