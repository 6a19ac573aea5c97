"""The commands that make and revoke keys, against a gateway that runs; and what it writes down of them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from imagemesh_cli.main import main
from imagemesh_cli.rooms import configure
from imagemesh_client import Client, MeshError
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.service import create
from tests.support.keys import key_file
from tests.support.mesh import FREE_PORTS, event_loop


@contextmanager
def gateway(keys: Path) -> Iterator[str]:
    """Where one listens that has no services, and asks for keys."""
    with event_loop() as loop:

        async def start() -> Any:
            server = create(configure(GatewayConfig, {**FREE_PORTS, "keys_file": str(keys)}))
            await server.start()
            return server

        server = loop.run(start())
        try:
            yield server.address
        finally:
            loop.run(server.stop())


def code(address: str, key: str) -> str:
    """What comes of a call with the key."""
    with Client(address, key=key) as client:
        try:
            client.models()
        except MeshError as error:
            return error.code.name
    return "OK"


def wait_for(wanted: str, address: str, key: str) -> None:
    deadline = time.monotonic() + 20
    while code(address, key) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_keys_are_made_listed_and_revoked_by_command_while_the_gateway_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--file", str(tmp_path / "keys.json")]
    assert main(["keys", "create", *file]) == 0
    first = capsys.readouterr().out.strip()
    with gateway(tmp_path / "keys.json") as address:
        assert code(address, first) == "OK"
        limits = ["--expires", "90d", "--pixel-steps-per-day", "1.5G", "--max-jobs", "4", "--role", "viewer"]
        assert main(["keys", "create", *file, "--tenant", "new", "--name", "carol", *limits, "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert (made["tenant"], made["pixel_steps_per_day"], made["state"]) == ("new", 1_500_000_000, "active")
        wait_for("OK", address, made["key"])
        assert main(["keys", "list", *file]) == 0
        table = capsys.readouterr().out
        assert f"{made['id']}  active  new" in table
        assert made["key"] not in table
        assert main(["keys", "revoke", *file, made["id"]]) == 0
        wait_for("UNAUTHENTICATED", address, made["key"])
        assert code(address, first) == "OK"
    assert main(["keys", "create", *file, "--tenant", "No Such"]) == 2
    assert "--tenant must be" in capsys.readouterr().err


def test_the_file_may_be_named_by_the_gateways_own_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "list"])
    assert "required: --file" in capsys.readouterr().err
    monkeypatch.setenv("IMAGEMESH_GATEWAY_KEYS_FILE", str(tmp_path / "keys.json"))
    assert main(["keys", "create"]) == 0
    assert main(["keys", "list", "--json"]) == 0


def test_no_secret_is_in_a_log_or_a_metric(tmp_path: Path) -> None:
    tokens = key_file(tmp_path / "keys.json", alice={"role": "admin"}, old={"expired": True})
    env = {
        **os.environ, "IMAGEMESH_LOG_LEVEL": "DEBUG", "IMAGEMESH_LISTEN": "127.0.0.1:0",
        "IMAGEMESH_HTTP_LISTEN": "127.0.0.1:0", "IMAGEMESH_GATEWAY_KEYS_FILE": str(tmp_path / "keys.json"),
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "imagemesh_cli.main", "serve", "gateway"], env=env, stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"), text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            grpc_address = line.split(",")[0].rpartition(" ")[2]
            http_address = line.strip().rpartition("http://")[2]
            metrics = ""
            for token in tokens.values():
                with Client(grpc_address, key=token) as client, pytest.raises(MeshError):
                    client.jobs.get("x")
                for headers in (bearer(token), {"Authorization": httpx.BasicAuth("u", token)._auth_header}):
                    httpx.post(f"http://{http_address}/v1/generate", json={"prompt": "x"}, headers=headers)
                    metrics += httpx.get(f"http://{http_address}/metrics", headers=headers).text
                with pytest.raises(InvalidStatus):
                    connect(f"ws://{http_address}/v1/jobs/x/socket", additional_headers=bearer(token))
            process.terminate()
            process.wait(timeout=60)
        finally:
            process.kill()
    log = (tmp_path / "log").read_text()
    assert "serves gRPC" in log
    assert "imagemesh_refused_calls_total" in metrics
    for token in tokens.values():
        secret = token.split("_", 2)[2]
        basic = httpx.BasicAuth("u", token)._auth_header.split()[1]
        assert not any(one in text for one in (secret, basic[8:]) for text in (log, metrics))
