"""What the host and the command's settings promise before anything is started."""

import socket
from contextlib import closing
from pathlib import Path

import pytest

from imagemesh_cli.host import require_free
from imagemesh_cli.parser import build_parser
from imagemesh_cli.rooms import GATEWAY, SERVICES, Room, configure
from imagemesh_cli.server_commands import _gateway
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument


@pytest.mark.parametrize(("name", "room"), [*SERVICES.items(), ("gateway", GATEWAY)])
def test_every_room_has_its_configuration(name: str, room: Room) -> None:
    assert name == room.config().SERVICE


def test_settings_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[vae]\nmax_batch = 1\nmax_queue = 1\nthreads = 1\n")
    monkeypatch.setenv("IMAGEMESH_VAE_MAX_BATCH", "2")
    monkeypatch.setenv("IMAGEMESH_VAE_MAX_QUEUE", "2")
    config = configure(SERVICES["vae"].config(), {"max_batch": "3"}, file)
    assert (config.max_batch, config.max_queue, config.threads) == (3, 2, 1)


def test_a_setting_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(InvalidArgument, match=r"one of .*max_batch"):
        configure(SERVICES["vae"].config(), {"sauce": "hot"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--grpc-port", "1"], {"listen": "127.0.0.1:1"}),
        (["--http-port", "0"], {"http_listen": "127.0.0.1:0"}),
        (["--host", "0.0.0.0"], {"listen": "0.0.0.0:50050", "http_listen": "0.0.0.0:7860"}),
        (["--host", "::1", "--grpc-port", "2"], {"listen": "[::1]:2", "http_listen": "[::1]:7860"}),
    ],
)
def test_options_of_up_say_where_the_gateway_listens(arguments: list[str], expected: dict[str, str]) -> None:
    assert _gateway(build_parser().parse_args(["up", *arguments])) == expected


@pytest.mark.parametrize(
    ("arguments", "listen", "http_listen"),
    [
        ([], "10.0.0.1:5", "[::1]:6"),
        (["--grpc-port", "1"], "10.0.0.1:1", "[::1]:6"),
        (["--http-port", "2"], "10.0.0.1:5", "[::1]:2"),
        (["--host", "localhost"], "localhost:5", "localhost:6"),
    ],
)
def test_an_option_of_up_replaces_only_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], listen: str, http_listen: str
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('[gateway]\nlisten = "10.0.0.1:5"\n')
    monkeypatch.setenv("IMAGEMESH_GATEWAY_HTTP_LISTEN", "[::1]:6")
    options = _gateway(build_parser().parse_args(["up", "--config", str(file), *arguments]))
    config = configure(GATEWAY.config(), options, file)
    assert (config.listen, config.http_listen) == (listen, http_listen)


def test_a_port_in_the_place_of_a_unix_socket_is_on_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMESH_GATEWAY_LISTEN", "unix:/somewhere/a.sock")
    assert _gateway(build_parser().parse_args(["up", "--grpc-port", "1"])) == {"listen": "127.0.0.1:1"}


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["up", f"--grpc-port={port}"])
    assert caught.value.code == 2
    assert f"--grpc-port: must be a whole number from 0 to 65535, got '{port}'" in capsys.readouterr().err


def test_a_taken_address_is_told_with_its_reason() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FailedPrecondition, match=f"vae cannot listen on {address}: Address already in use$"):
            require_free("vae", "127.0.0.1:0", address)


@pytest.mark.parametrize("address", ["unix:/somewhere/a.sock", "127.0.0.1:0", "localhost:0", "0.0.0.0:0"])
def test_free_addresses_pass(address: str) -> None:
    require_free("vae", address)


@pytest.mark.parametrize("address", ["192.0.2.1:0", "no.such.host.invalid:0", "127.0.0.1:65536", "127.0.0.1:http"])
def test_an_address_that_cannot_be_bound_is_told(address: str) -> None:
    with pytest.raises(FailedPrecondition, match="vae cannot listen on"):
        require_free("vae", address)
