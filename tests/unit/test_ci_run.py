"""What .ci/run installs on a machine that lacks it, as whom, and what it says where it can't."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.sizes import ROOT

PYTHON = """case "$2" in
  *ensurepip*) [ -e "$STATE/venv" ] ;;
  *version_info*) [ ! -e "$STATE/old" ] ;;
  *) echo "Python 3.9.2" ;;
esac"""
# What installing does here: the tools are there afterwards.
APT = """echo "apt-get $*" >> "$STATE/log"
for package in "$@"; do
  case "$package" in
    python3-venv) touch "$STATE/venv" ;;
    git|make|npm|curl) cp "$STATE/tool" "$BIN/$package" ;;
  esac
done"""
LOGGED = 'echo "$(basename "$0") $*" >> "$STATE/log"'


class Machine:
    """A folder as PATH with stand-ins for the programs that .ci/run calls, which note their calls."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.state = root, root / "bin", root / "state"
        for folder in (self.bin, self.state, root / "repo" / ".ci"):
            folder.mkdir(parents=True)
        shutil.copy(ROOT / ".ci" / "run", root / "repo" / ".ci" / "run")
        for name in ("bash", "dirname", "basename", "env", "touch", "cp"):
            (self.bin / name).symlink_to(str(shutil.which(name)))
        self.put("python3", PYTHON)
        self.put("apt-get", APT)
        self.user(0)
        shutil.move(self.put("tool", LOGGED), self.state / "tool")

    def put(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def user(self, uid: int) -> None:
        self.put("id", f"echo {uid}")

    def run(self) -> "subprocess.CompletedProcess[str]":
        env = {"PATH": str(self.bin), "BIN": str(self.bin), "STATE": str(self.state)}
        script = self.root / "repo" / ".ci" / "run"
        return subprocess.run([script], env=env, capture_output=True, text=True, check=False)

    def log(self) -> list[str]:
        log = self.state / "log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


STEPS = ["make dev", "make protos", "make lint", "make test"]


def test_a_bare_machine_gets_all_that_is_needed_and_then_everything_runs(bare: Machine) -> None:
    done = bare.run()
    assert done.returncode == 0, done.stderr
    update, install, *rest = bare.log()
    assert update == "apt-get update -qq"
    assert install.startswith("apt-get install -y -qq python3 python3-venv git make npm curl openssl")
    assert [line for line in rest if line.startswith("make ")] == STEPS


def test_what_is_there_is_not_installed(bare: Machine) -> None:
    (bare.state / "venv").touch()
    for tool in ("git", "make", "curl", "openssl", "promtool"):
        shutil.copy(bare.state / "tool", bare.bin / tool)
    assert bare.run().returncode == 0
    packages = bare.log()[1].removeprefix("apt-get install -y -qq ").split()
    assert [package for package in packages if not package.startswith("fonts-")] == ["npm"]


def test_who_is_not_root_installs_with_sudo(bare: Machine) -> None:
    bare.user(1000)
    bare.put("sudo", 'echo "sudo $1" >> "$STATE/log"; "$@"')
    assert bare.run().returncode == 0
    assert [line for line in bare.log() if line.startswith("sudo")] == ["sudo apt-get", "sudo env"]


def test_without_root_and_sudo_it_says_what_is_missing(bare: Machine) -> None:
    bare.user(1000)
    done = bare.run()
    assert done.returncode == 1
    wanted = "python3 python3-venv git make npm curl openssl"
    assert f"run it as root or install sudo; it would install {wanted}" in done.stderr
    assert bare.log() == []


def test_an_old_python_is_named(bare: Machine) -> None:
    (bare.state / "old").touch()
    done = bare.run()
    assert done.returncode == 1
    assert "needs Python 3.11 or newer, python3 is Python 3.9.2" in done.stderr
    assert not any(line.startswith("make ") for line in bare.log())


def test_a_machine_that_is_no_debian_is_told_the_packages(bare: Machine) -> None:
    (bare.bin / "apt-get").unlink()
    done = bare.run()
    assert done.returncode == 1
    assert "no apt-get here; install what Debian calls python3 python3-venv" in done.stderr


def test_it_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
