"""Qdrant's REST API, as far as search speaks it, over qdrant-client's local mode: what a client sends is read by the
models of Qdrant's own schema, and what it is answered is written by them."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models
from qdrant_client.http.models import CollectionExistence

Call = Callable[[QdrantClient, str, Any], Any]


def _query(client: QdrantClient, name: str, body: models.QueryRequestBatch) -> Any:
    for one in body.searches:  # in the process every search is an exact one, and says so as a warning
        assert one.params.exact
        one.params = None
    return client.query_batch_points(name, body.searches)


def _scroll(client: QdrantClient, name: str, body: models.ScrollRequest) -> Any:
    points, after = client.scroll(
        name, limit=body.limit, offset=body.offset, with_payload=body.with_payload, with_vectors=body.with_vector
    )
    return models.ScrollResult(points=points, next_page_offset=after)


def _create(client: QdrantClient, name: str, body: models.CreateCollection) -> Any:
    return client.create_collection(name, body.vectors, metadata=body.metadata)


# By method and what follows "/collections": how the body is read, and what is done.
ROUTES: dict[tuple[str, str], tuple[Any, Call]] = {
    ("GET", ""): (None, lambda client, name, body: client.get_collections()),
    ("GET", "/NAME"): (None, lambda client, name, body: client.get_collection(name)),
    ("GET", "/NAME/exists"): (
        None, lambda client, name, body: CollectionExistence(exists=client.collection_exists(name))
    ),
    ("PUT", "/NAME"): (models.CreateCollection, _create),
    ("DELETE", "/NAME"): (None, lambda client, name, body: client.delete_collection(name)),
    ("PUT", "/NAME/points"): (models.PointsList, lambda client, name, body: client.upsert(name, body.points)),
    ("POST", "/NAME/points"): (
        models.PointRequest, lambda client, name, body: client.retrieve(name, body.ids, with_payload=body.with_payload)
    ),
    ("POST", "/NAME/points/delete"): (
        models.PointIdsList, lambda client, name, body: client.delete(name, models.PointIdsList(points=body.points))
    ),
    ("POST", "/NAME/points/scroll"): (models.ScrollRequest, _scroll),
    ("POST", "/NAME/points/count"): (models.CountRequest, lambda client, name, body: client.count(name)),
    ("POST", "/NAME/points/query/batch"): (models.QueryRequestBatch, _query),
}  # fmt: skip


class QdrantServer(ThreadingHTTPServer):
    """Serves from when it is made until ``shutdown``; ``token`` is the API key that it wants."""

    daemon_threads = True
    token = "the key"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.empty()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def empty(self) -> None:
        """Forget everything."""
        self.client = QdrantClient(":memory:")

    def answer(self, method: str, path: str, key: str | None, data: bytes) -> tuple[int, Any]:
        """The status and the result, or what is wrong."""
        name, rest = re.fullmatch(r"/collections(?:/([^/]+)(.*))?", path.partition("?")[0]).groups()
        route = "" if name is None else f"/NAME{rest}"
        if key != self.token:
            return 403, "Must provide an API key"
        model, call = ROUTES[method, route]
        body = None if model is None else TypeAdapter(model).validate_json(data)
        with self.lock:
            try:
                return 200, call(self.client, name, body)
            except ValueError as error:
                return 404 if "not found" in str(error) else 409, str(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: QdrantServer

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        status, told = self.server.answer(self.command, self.path, self.headers.get("api-key"), data)
        envelope = {"result": told, "status": "ok"} if status == 200 else {"status": {"error": told}}
        sent = TypeAdapter(Any).dump_json({**envelope, "time": 0.0})
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def qdrant_server() -> Iterator[QdrantServer]:
    """A running one, on any free port."""
    server = QdrantServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
