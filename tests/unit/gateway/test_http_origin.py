"""A page of another site can't change anything through a user's browser."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from imagemesh_gateway.access.door import Door
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.http_guard import Guard, HttpLimits
from imagemesh_runtime.metrics import Metrics


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def client(calls: list[str]) -> TestClient:
    app = FastAPI()

    async def change() -> dict[str, str]:
        calls.append("change")
        return {}

    app.add_api_route("/change", change, methods=["POST", "DELETE", "GET"])
    metrics = Metrics("gateway")
    guard = Guard(app, metrics, HttpLimits(4, 4, 1000, 4000, 5.0, 5.0), Door(GatewayConfig(), metrics))
    return TestClient(guard, base_url="http://mesh:7860")


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://mesh:7861", "http://[", ""])
def test_a_page_of_another_site_changes_nothing(client: TestClient, calls: list[str], method: str, origin: str) -> None:
    answer = client.request(method, "/change", headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "PERMISSION_DENIED")
    assert calls == []


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://mesh:7860"}, {"Origin": "HTTP://MESH:7860"}])
def test_own_pages_and_other_programs_do(client: TestClient, calls: list[str], headers: dict[str, str]) -> None:
    assert client.post("/change", headers=headers).status_code == 200
    assert calls == ["change"]


def test_reading_is_left_to_the_browser(client: TestClient) -> None:
    assert client.get("/change", headers={"Origin": "http://evil.example"}).status_code == 200
