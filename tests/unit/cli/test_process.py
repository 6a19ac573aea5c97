"""The command as a process: help, terminal, interrupt."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

from imagemesh_cli.parser import build_parser
from tests.support.recording_gateway import RecordingGateway

# As a shell would start it: a parent in the background may have told us to ignore interrupts.
RUN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from imagemesh_cli.main import main; sys.exit(main())"
)
COMMANDS = (
    "up", "serve", "tune", "export", "quantize", "distill", "demo", "generate", "classify", "embed", "jobs", "models",
    "schedulers", "guiders",
)  # fmt: skip


MADE = ("a-model", "-o", "out", "--images", __file__)


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})  # type: ignore[call-overload, no-any-return]


# A service that takes for ever to import its libraries, or to load its models.
SLOW = {
    "importing": "rooms.Room.create = lambda *_: (print('begun', flush=True), time.sleep(600))",
    "loading": (
        "create = rooms.Room.create\n"
        "async def start(): print('begun', flush=True); await asyncio.sleep(600)\n"
        "def slow(*args): server = create(*args); server.start = start; return server\n"
        "rooms.Room.create = slow"
    ),
}


@pytest.mark.parametrize(("name", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("how", SLOW)
def test_a_service_that_is_still_starting_stops_at_once(how: str, name: signal.Signals, code: int) -> None:
    script = f"import asyncio, time\nfrom imagemesh_cli import rooms\n{SLOW[how]}\n{RUN}"
    given = ["serve", "vae", "--listen", "127.0.0.1:0", "--set", "backend=fake", "--set", "metrics-listen=127.0.0.1:0"]
    command = [sys.executable, "-c", script, *given, "--set", "admin-listen=127.0.0.1:0"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(name)
            process.communicate(timeout=60)
        finally:
            process.kill()
    # Once there is a server, an interrupt is a request to stop like any other.
    assert process.returncode == (code if how == "importing" else 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_loads_nothing_heavy(name: str) -> None:
    code = "import sys; from imagemesh_cli.main import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, text=True, check=True)
    heavy = ("torch", "numpy", "grpc", "PIL", "rich", "imagemesh_services", "imagemesh_gateway", "imagemesh_client")
    assert [module for module in done.stderr.split() if module.startswith(heavy)] == []
    assert done.stdout.startswith("usage:")


@pytest.mark.parametrize(
    "arguments", [["up"], ["serve", "vae"], ["demo"], ["generate", "a", "-o", "b"], ["models"], ["classify", __file__],
                  ["embed", __file__], ["export", *MADE], ["quantize", *MADE], ["distill", *MADE]]
)  # fmt: skip
def test_every_command_has_its_function(arguments: list[str]) -> None:
    args = build_parser().parse_args(arguments)
    assert callable(resolve_name(f"imagemesh_cli.{args.run}"))


def test_client_commands_load_no_service(gateway: RecordingGateway) -> None:
    code = "import sys; from imagemesh_cli.main import main; main(); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "models", "--server", gateway.address]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy = ("torch", "rich", "fastapi", "imagemesh_services", "imagemesh_gateway")
    assert [module for module in done.stderr.split() if module.startswith(heavy)] == []


def test_a_bar_is_shown_on_a_terminal(gateway: RecordingGateway, tmp_path: Path) -> None:
    gateway.hold = True  # so that the bar has been drawn when the process ends
    terminal, end = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = start("generate", "a fox", "-o", tmp_path / "fox.png", "--server", gateway.address, stderr=end,
                    env=environment)  # fmt: skip
    os.close(end)
    shown = b""
    while b"1/3" not in shown:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    os.close(terminal)
    assert b"generating" in shown


def test_no_bar_is_shown_elsewhere(gateway: RecordingGateway, tmp_path: Path) -> None:
    process = start("generate", "a fox", "-o", tmp_path / "fox.png", "--server", gateway.address)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out.startswith(str(tmp_path))


def test_ctrl_c_cancels_the_generation_and_exits_130(gateway: RecordingGateway, tmp_path: Path) -> None:
    gateway.hold = True
    process = start("generate", "a fox", "-o", tmp_path / "fox.png", "--server", gateway.address)
    assert gateway.holding.wait(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert gateway.cancelled.wait(20)
    assert list(tmp_path.iterdir()) == []
