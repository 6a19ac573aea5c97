"""Runs what a page of the documentation tells a reader to type.

Fenced ``bash`` and ``python`` blocks run in the order of the page, in one folder, with one mesh at hand. Blocks in the
languages of ``SHOWN`` are shown, not run. In bash, three kinds of line have a meaning of their own:

- ``make TARGET``: the Makefile must have the target. Only ``make demo`` is run: its recipe, by this interpreter.
- ``imagemesh up`` and ``imagemesh serve``: run on free ports until they say where they listen, then stopped.
- anything else is run; the addresses of the documentation become those of the mesh.
"""

import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SHOWN = {"console", "text", "json", "toml", "yaml", "protobuf"}
SECONDS = 180

_FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MAKE = re.compile(r"make\b(.*)")
_SERVER = re.compile(r"(?:\w+=\S*\s+)*imagemesh (?:up|serve)\b")
_LISTENS = re.compile(r"listens on |imagemesh is up|^\{.*\"grpc\"")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TARGET = re.compile(r"^([a-z][\w-]*):(?!=)", re.MULTILINE)


class BrokenPage(Exception):
    """A reader who does what the page says gets an error."""


def _on_a_free_port(word: re.Match[str]) -> str:
    """What a server listens on becomes any port that is free; where it finds another stays."""
    if word[0].startswith("IMAGEMESH_") and "LISTEN=" not in word[0]:
        return word[0]
    return re.sub(r"\b(500\d\d|7860)\b", "0", word[0])


@dataclass(frozen=True)
class Block:
    """A fenced block, and the line that its text begins in."""

    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The blocks to run.

    Raises:
        BrokenPage: a block in a language of which nobody can tell whether it is to be run.
    """
    for match in _FENCE.finditer(page):
        block = Block(match[2].strip(), textwrap.dedent(match[3]), page.count("\n", 0, match.start(3)) + 1)
        if block.language in ("bash", "python"):
            yield block
        elif block.language not in SHOWN:
            raise BrokenPage(f"line {block.line - 1}: ```{block.language} is neither run nor one of {sorted(SHOWN)}")


def commands(text: str) -> Iterator[tuple[str, str]]:
    """A bash block cut into ("make" | "server" | "shell", what to type); lines of the shell stay together."""
    shell: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        kind = "make" if _MAKE.match(line) else "server" if _SERVER.match(line) else "shell"
        if kind == "shell":
            shell.append(line)
            continue
        if shell:
            yield "shell", "\n".join(shell)
            shell = []
        yield kind, line
    if shell:
        yield "shell", "\n".join(shell)


def make_targets(makefile: str) -> dict[str, list[str]]:
    """The targets, each with the lines of its recipe."""
    found: dict[str, list[str]] = {}
    recipe: list[str] = []
    for line in makefile.splitlines():
        if line.startswith("\t"):
            recipe.append(line.strip())
        elif match := _TARGET.match(line):
            recipe = found[match[1]] = []
    return found


def dead_links(page: Path) -> list[str]:
    """Links of the page to files that aren't there, and `make` targets that it names and nobody has."""
    text = page.read_text()
    links = [link.partition("#")[0] for link in _LINK.findall(text) if not re.match(r"\w+:", link)]
    dead = [link for link in links if link and not (page.parent / link).exists()]
    targets = make_targets((ROOT / "Makefile").read_text())
    return dead + [f"make {name}" for name in re.findall(r"`make ([\w-]+)", text) if name not in targets]


@dataclass
class PageRunner:
    """A reader in a folder of their own, with a mesh that listens at ``grpc`` and ``http``."""

    folder: Path
    grpc: str
    http: str
    settings: Mapping[str, str] = field(default_factory=dict)
    makefile: str = field(default_factory=(ROOT / "Makefile").read_text)

    def run(self, page: str) -> int:
        """Do all that the page says; answers how many commands that were.

        Raises:
            BrokenPage: something failed; says where in the page, and how.
        """
        done = 0
        for block in blocks(page):
            todo = commands(block.text) if block.language == "bash" else [("python", block.text)]
            for kind, command in todo:
                try:
                    getattr(self, f"_{kind}")(command)
                except BrokenPage as error:
                    raise BrokenPage(f"line {block.line}: {command}\n{error}") from error
                done += 1
        return done

    def _shell(self, command: str) -> None:
        self._call(["bash", "-euo", "pipefail", "-c", self._addressed(command)])

    def _python(self, code: str) -> None:
        self._call([sys.executable, "-c", self._addressed(code)])

    def _make(self, command: str) -> None:
        words = [word for word in command.partition("#")[0].split()[1:] if "=" not in word and word[0] != "-"]
        targets = make_targets(self.makefile)
        for target in words:
            if target not in targets:
                raise BrokenPage(f"the Makefile has no target {target}")
            if target == "demo":
                self._shell("\n".join(targets[target]).replace("$(BIN)", str(BIN)))

    def _server(self, command: str) -> None:
        on_free_ports = re.sub(r"\S+", _on_a_free_port, command.partition("#")[0]).rstrip(" &")
        shell = ["bash", "-c", f"exec env {on_free_ports}"]
        with subprocess.Popen(
            shell, cwd=self.folder, env=self._env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            too_late = threading.Timer(SECONDS, process.kill)
            too_late.start()
            try:
                assert process.stdout is not None
                said: list[str] = []
                for line in process.stdout:
                    said.append(line)
                    if _LISTENS.search(line):
                        break
                else:
                    raise BrokenPage(f"never said that it listens:\n{''.join(said)}")
                process.terminate()
                rest, _ = process.communicate(timeout=SECONDS)
                if process.returncode:
                    raise BrokenPage(f"ended with {process.returncode} when told to stop:\n{''.join(said)}{rest}")
            finally:
                too_late.cancel()
                process.kill()

    def _addressed(self, text: str) -> str:
        """With the mesh's addresses in place of those that the documentation uses."""
        text = re.sub(r"(127\.0\.0\.1|localhost):50050\b", self.grpc, text)
        return re.sub(r"(127\.0\.0\.1|localhost):7860\b", self.http, text)

    def _env(self) -> dict[str, str]:
        """With the command in PATH; a mesh for clients; free ports for servers that don't say theirs."""
        free = {"IMAGEMESH_LISTEN": "127.0.0.1:0", "IMAGEMESH_HTTP_LISTEN": "127.0.0.1:0"}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **free, "IMAGEMESH_SERVER": self.grpc, "PATH": path, **self.settings}

    def _call(self, command: list[str]) -> None:
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self._env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BrokenPage(f"took more than {SECONDS} s") from error
        if done.returncode:
            raise BrokenPage(f"ended with {done.returncode}:\n{done.stdout}")
