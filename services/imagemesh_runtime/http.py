"""The small HTTP ports of a service: one to scrape, one to administer.

They are two ports because whoever may scrape must not be able to drain.
"""

import logging
import selectors
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

log = logging.getLogger(__name__)

# (method, path) -> handler(accept header) -> (status, content type, body)
Answer = tuple[int, str, bytes]
Routes = Mapping[tuple[str, str], Callable[[str], Answer]]
_TEXT = "text/plain; charset=utf-8"


def metrics_routes(
    registry: CollectorRegistry, ready: Callable[[], bool], alive: Callable[[], bool] = lambda: True
) -> Routes:
    """``/metrics``, ``/healthz`` (the process lives) and ``/readyz`` (it takes new work)."""

    def metrics(accept: str) -> Answer:
        encode, content_type = choose_encoder(accept)
        return 200, content_type, encode(registry)

    def readyz(_: str) -> Answer:
        return (200, _TEXT, b"ready\n") if ready() else (503, _TEXT, b"not ready\n")

    def healthz(_: str) -> Answer:
        return (200, _TEXT, b"alive\n") if alive() else (503, _TEXT, b"hangs\n")

    return {
        ("GET", "/metrics"): metrics,
        ("GET", "/healthz"): healthz,
        ("GET", "/readyz"): readyz,
    }


def admin_routes(drain: Callable[[], None]) -> Routes:
    """``/drain``: take no new work. GET as well as POST, since a Kubernetes preStop hook can only GET."""

    def handle(_: str) -> Answer:
        drain()
        return 200, _TEXT, b"draining\n"

    return {("POST", "/drain"): handle, ("GET", "/drain"): handle}


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's own class, which looks its host's name up when it binds: seconds, where DNS is slow.
    allow_reuse_address = True
    daemon_threads = True
    timeout = 0  # of handle_request, which is called when there is one


class _Server6(_Server):
    address_family = socket.AF_INET6


class HttpServer:
    """Serves fixed routes from daemon threads.

    Where nobody asks, nothing runs: ``serve_forever`` would wake up many times a second to see whether it should stop,
    and twelve such threads in one process take their turns on the cores, and Python's lock, from what computes.
    """

    def __init__(self, listen: str, routes: Routes) -> None:
        host, _, port = listen.rpartition(":")
        server = _Server6 if ":" in host else _Server
        self._server = server((host.strip("[]"), int(port)), _handler(routes))
        self._told, self._tell = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name=f"http-{listen}", daemon=True)

    @property
    def address(self) -> str:
        """``host:port`` as bound."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if isinstance(self._server, _Server6) else f"{host!s}:{port}"

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port."""
        self._tell.close()
        if self._thread.is_alive():
            self._thread.join()
        self._server.server_close()
        self._told.close()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._told, selectors.EVENT_READ)  # which reads as ended once the other end is closed
            while not any(key.fileobj is self._told for key, _ in selector.select()):
                self._server.handle_request()


def _handler(routes: Routes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds that a slow client may hold a thread

        def _answer(self) -> None:
            try:
                status, kind, body = self._route()
            except Exception:
                log.exception("%s %s failed", self.command, self.path)
                status, kind, body = 500, _TEXT, b"failed; the log has the details\n"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _route(self) -> Answer:
            route = routes.get((self.command, self.path.partition("?")[0]))
            return (404, _TEXT, b"not found\n") if route is None else route(self.headers.get("Accept", ""))

        do_GET = do_POST = _answer  # noqa: N815 - the names that the base class looks for

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not worth a log line."""

    return Handler
