"""The small HTTP ports: they answer, they stop at once, and while nobody asks they do nothing."""

import selectors
import threading
from typing import Any

import httpx
import pytest

from imagemesh_runtime.http import HttpServer

ROUTES = {("GET", "/here"): lambda accept: (200, "text/plain", accept.encode())}


def test_it_answers_until_it_is_stopped() -> None:
    server = HttpServer("127.0.0.1:0", ROUTES)
    server.start()
    url = f"http://{server.address}"
    assert httpx.get(f"{url}/here", headers={"Accept": "x/y"}).text == "x/y"
    assert httpx.get(f"{url}/there").status_code == 404
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/here")


def test_one_that_never_started_can_be_stopped() -> None:
    server = HttpServer("127.0.0.1:0", ROUTES)
    server.stop()
    HttpServer(server.address, ROUTES).stop()  # the port is free again


def test_it_waits_without_waking_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []
    entered = threading.Event()

    class Watched(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            waits.append(timeout)
            entered.set()
            return super().select(timeout)

    monkeypatch.setattr(selectors, "DefaultSelector", Watched)
    server = HttpServer("127.0.0.1:0", ROUTES)
    server.start()
    assert entered.wait(10)
    httpx.get(f"http://{server.address}/here")
    server.stop()
    assert waits
    assert set(waits) == {None}
    assert len(waits) <= 3
