"""What the documentation tells a reader to type works, and what it points at is there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import imagemesh_models
from imagemesh_runtime.registry import Repository
from tests.support.mesh import running_mesh
from tests.support.pages import ROOT, BrokenPage, PageRunner, blocks, commands, dead_links, make_targets

pytestmark = pytest.mark.timeout(600)

PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
TO_RUN = [name for name, path in PAGES.items() if "```" in path.read_text()]


@pytest.fixture(scope="module")
def settings(models: Path) -> dict[str, str]:
    """The shipped models if they are here, and small random ones behind them."""
    shipped = imagemesh_models.root()
    whole = any(folder.has("unet", "vae", "text_encoder") for folder in Repository([shipped]).folders().values())
    roots = [shipped, models] if whole else [models]
    return {"IMAGEMESH_MODELS": os.pathsep.join(map(str, roots))}


@pytest.fixture(scope="module")
def mesh(settings: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Where gRPC and HTTP listen."""
    with running_mesh(backend="torch", models=settings["IMAGEMESH_MODELS"]) as host:
        yield host.grpc_address, host.http_address


@pytest.fixture
def runner(mesh: tuple[str, str], settings: dict[str, str], tmp_path: Path) -> PageRunner:
    return PageRunner(tmp_path, *mesh, settings)


@pytest.fixture
def alone(tmp_path: Path) -> PageRunner:
    """A reader without a mesh, and with a Makefile of three targets."""
    makefile = 'X := 1\ntest: dev ## all\n\tpytest\n\ndemo:\n\t$(BIN)/python -c \'open("made", "w")\'\n\n.PHONY: x\n'
    return PageRunner(tmp_path, "127.0.0.1:1", "127.0.0.1:2", {"IMAGEMESH_BACKEND": "fake"}, makefile)


@pytest.mark.parametrize("name", TO_RUN)
def test_what_a_page_says_to_type_works(name: str, runner: PageRunner):
    page = PAGES[name].read_text()
    assert runner.run(page) >= len(list(blocks(page)))


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_points_at_is_there(name: str):
    assert dead_links(PAGES[name]) == []


def bash(*lines: str) -> str:
    return "\n".join(["# A page", "", "```bash", *lines, "```", ""])


def test_blocks_run_in_order_and_share_a_folder(alone: PageRunner):
    page = "{}\n```python\nopen('b', 'w').write(open('a').read() + 'y')\n```\n{}"
    assert alone.run(page.format(bash("echo x > a"), bash('test "$(tr -d "\\n" < b)" = xy'))) == 3


BROKEN = {
    "second line": (bash("true", "false"), r"(?s)line 4: true\nfalse.*ended with 1"),
    "in a pipe": (bash("false | cat"), "ended with 1"),
    "before and": (bash("ls nowhere && true"), "nowhere"),
    "unset name": (bash("echo $UNSET_NAME"), "UNSET_NAME"),
    "unknown command": (bash("imagemesh paint"), "ended with 2"),
    "like up": (bash("imagemesh upp"), "ended with 2"),
    "no mesh": (bash("imagemesh models --server 127.0.0.1:50050"), "127.0.0.1:1"),
    "no http": (bash("curl -sS http://localhost:7860/readyz"), "ended with 7"),
    "target": (bash("make tset"), "no target tset"),
    "second target": (bash("make test tset X=1"), "no target tset"),
    "server": (bash("imagemesh serve vae --backend abacus"), r"(?s)never said.*abacus"),
    "import": ("```python\nimport imagemesh_cleint\n```\n", "imagemesh_cleint"),
    "in a list": ("1. So:\n\n   ```python\n   1 / 0\n   ```\n", "line 4: 1 / 0(?s:.*)ZeroDivisionError"),
    "other shell": ("```sh\ntrue\n```\n", "line 1: ```sh"),
    "no language": ("```\ntrue\n```\n", "neither run"),
}


@pytest.mark.parametrize(("page", "complaint"), BROKEN.values(), ids=BROKEN)
def test_a_broken_page_is_told_where_and_how(alone: PageRunner, page: str, complaint: str):
    with pytest.raises(BrokenPage, match=complaint):
        alone.run(page)


@pytest.mark.parametrize(
    "line",
    [
        "IMAGEMESH_VAE_MAX_BATCH=4 imagemesh serve vae --listen 127.0.0.1:50053 &  # in the background",
        "imagemesh up --grpc-port 50050 --http-port 7860",
        "imagemesh up --json",
    ],
)
def test_servers_are_run_until_they_listen(alone: PageRunner, line: str):
    assert alone.run(bash(line)) == 1


def test_only_the_demo_is_made(alone: PageRunner):
    assert alone.run(bash("make test", "make demo PYTHON=python3.12")) == 2
    assert [path.name for path in alone.folder.iterdir()] == ["made"]


def test_what_is_shown_is_not_run(alone: PageRunner):
    assert alone.run("```console\n$ false\n```\n```text\nfalse\n```\n") == 0


def test_lines_of_the_shell_stay_together_and_go_on_after_a_backslash():
    text = "cd x\necho \\\n  y\nmake test\nimagemesh serve vae\nA=1 imagemesh up\nimagemesh models\n"
    assert [(kind, " ".join(command.split())) for kind, command in commands(text)] == [
        ("shell", "cd x echo y"),
        ("make", "make test"),
        ("server", "imagemesh serve vae"),
        ("server", "A=1 imagemesh up"),
        ("shell", "imagemesh models"),
    ]


def test_targets_come_with_their_recipes():
    assert make_targets("A := b\nx: y ## why\n\tone\n\ttwo\n\ny:\n\tz\n") == {"x": ["one", "two"], "y": ["z"]}


def test_dead_links_and_targets_are_found(tmp_path: Path):
    (tmp_path / "here.md").touch()
    page = tmp_path / "page.md"
    page.write_text("[a](here.md#top) ![b](gone.png) [c](https://x.y/z) [d](#e) [f](sub/) `make test` `make tset X=1`")
    assert dead_links(page) == ["gone.png", "sub/", "make tset"]
