"""A server's life: ready, draining, stopped; what its ports say and to whom."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from imagemesh_runtime import interceptors
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.errors import Unauthenticated
from imagemesh_runtime.interceptors import Call
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.server import LIVENESS, READINESS, MeshServer
from imagemesh_runtime.service import serve
from tests.support.echo import NAME, Echo, EchoStub, add_echo, calling, echoing, http, scrape, serving
from tests.support.signalled import Recorded
from tests.support.sizes import ROOT

HELLO = StringValue(value="hello")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Slow:
    """A stream whose second message waits for ``go``."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def stream(self, request, context):
        yield StringValue(value="first")
        await self.go.wait()
        yield StringValue(value="last")


async def check(server: MeshServer, name: str) -> int:
    async with grpc.aio.insecure_channel(server.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        return answer.status


async def test_health_knows_liveness_readiness_the_server_and_each_service() -> None:
    async with serving() as server:
        for name in ("", LIVENESS, READINESS, NAME):
            assert await check(server, name) == SERVING


async def test_a_server_that_is_not_ready_is_alive() -> None:
    async with serving() as server:
        await server.set_ready(False)
        assert await check(server, LIVENESS) == SERVING
        for name in ("", READINESS, NAME):
            assert await check(server, name) == NOT_SERVING


async def test_health_of_an_unknown_service_is_not_found() -> None:
    async with serving() as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(server, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_every_watcher_hears_of_a_change_also_after_another_left() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        watchers = [watch(health_pb2.HealthCheckRequest(service=READINESS)) for _ in range(3)]
        assert [(await watcher.read()).status for watcher in watchers] == [SERVING] * 3
        watchers.pop(0).cancel()
        await server.set_ready(False)
        assert [(await watcher.read()).status for watcher in watchers] == [NOT_SERVING] * 2


async def test_a_watcher_of_an_unknown_service_hears_that_it_is_unknown() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.address) as channel:
        watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_a_watch_outlasts_the_default_deadline_and_ends_with_the_server() -> None:
    async with serving(request_timeout_seconds=0.05, drain_grace_seconds=60.0) as server:
        channel = grpc.aio.insecure_channel(server.address)
        watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watcher.read()).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError):  # another call meets the default deadline, the watch does not
            await EchoStub(channel).client_stream(_never())
        assert not watcher.done()
        await asyncio.wait_for(server.stop(), 5)  # far less than the grace period
        assert (await watcher.read()).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watcher.read()
        await channel.close()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def _never():
    await asyncio.Event().wait()
    yield HELLO


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services(version: str) -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        listed = {service.name for service in (await call.read()).list_services_response.service}
    assert {NAME, "grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"} <= listed


async def test_the_http_ports_tell_life_and_readiness() -> None:
    async with serving() as server:
        metrics = server.metrics_http.address
        assert (await http(metrics, "/healthz"))[0] == 200
        assert (await http(metrics, "/readyz"))[0] == 200
        await server.set_ready(False)
        assert (await http(metrics, "/healthz"))[0] == 200
        assert (await http(metrics, "/readyz"))[0] == 503


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_admin_port_drains_while_a_running_stream_ends_well(method: str) -> None:
    slow = Slow()
    async with echoing(Echo(server_stream=slow.stream)) as (server, stub):
        call = stub.server_stream(HELLO)
        await call.read()
        assert (await http(server.admin_http.address, "/drain", method))[0] == 200
        assert await check(server, READINESS) == NOT_SERVING
        assert await check(server, LIVENESS) == SERVING
        assert (await http(server.metrics_http.address, "/readyz"))[0] == 503
        slow.go.set()
        assert (await call.read()).value == "last"
        assert await call.code() is grpc.StatusCode.OK


async def test_draining_lasts_until_load_balancers_have_heard_and_whoever_comes_meanwhile_is_served() -> None:
    async with echoing(drain_settle_seconds=0.5) as (server, stub), asyncio.timeout(20):
        begun = time.monotonic()
        draining = asyncio.create_task(http(server.admin_http.address, "/drain"))
        while server.ready:
            await asyncio.sleep(0.01)
        assert (await stub.unary(HELLO)).value == "hello"
        assert not draining.done()
        assert (await draining)[0] == 200
        assert time.monotonic() - begun >= 0.5


async def test_who_may_scrape_cannot_drain() -> None:
    async with serving() as server:
        for method in ("GET", "POST"):
            assert (await http(server.metrics_http.address, "/drain", method))[0] == 404
        assert await check(server, READINESS) == SERVING
        assert (await http(server.admin_http.address, "/metrics"))[0] == 404


async def test_a_drained_server_does_not_become_ready_when_its_models_are_loaded() -> None:
    async with serving() as server:
        await server.drain()
        await server.set_ready()
        assert await check(server, READINESS) == NOT_SERVING


async def test_a_server_whose_device_hangs_is_neither_alive_nor_ready_until_it_goes_on() -> None:
    async with serving() as server:
        address = server.metrics_http.address
        for hangs, told, status in ((True, NOT_SERVING, 503), (False, SERVING, 200)):
            await server.set_hangs(hangs)
            assert [await check(server, name) for name in (LIVENESS, READINESS, NAME)] == [told] * 3
            assert [(await http(address, path))[0] for path in ("/healthz", "/readyz")] == [status] * 2
        await server.drain()
        await server.set_hangs(True)
        await server.set_hangs(False)
        assert [await check(server, name) for name in (LIVENESS, READINESS)] == [SERVING, NOT_SERVING]


async def test_a_server_that_still_loads_is_not_ready_because_its_device_goes_on() -> None:
    async with serving() as server:
        await server.set_ready(False)
        await server.set_hangs(True)
        await server.set_hangs(False)
        assert await check(server, READINESS) == NOT_SERVING


async def test_stop_lets_a_running_stream_finish_and_takes_no_new_call() -> None:
    slow = Slow()
    async with echoing(Echo(server_stream=slow.stream), drain_grace_seconds=10.0) as (server, stub):
        call = stub.server_stream(HELLO)
        await call.read()
        async with grpc.aio.insecure_channel(server.address) as channel:
            watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
            await watcher.read()
            stopping = asyncio.create_task(server.stop())
            assert (await watcher.read()).status == NOT_SERVING
            assert await watcher.code() is grpc.StatusCode.UNAVAILABLE  # the stop has begun
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.unary(HELLO)
        slow.go.set()
        assert (await call.read()).value == "last"
        assert await call.code() is grpc.StatusCode.OK
        await stopping
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_stop_ends_what_outlasts_the_grace_period() -> None:
    slow = Slow()
    async with echoing(Echo(server_stream=slow.stream), drain_grace_seconds=0.05) as (server, stub):
        call = stub.server_stream(HELLO)
        await call.read()
        await asyncio.wait_for(server.stop(), 5)
        assert await asyncio.wait_for(call.code(), 5) is not grpc.StatusCode.OK


async def test_a_server_that_never_started_stops() -> None:
    await asyncio.wait_for(MeshServer(ServerConfig(), Metrics("echo")).stop(), 5)


async def test_stopping_twice_is_once() -> None:
    async with serving() as server:
        await server.stop()


async def test_a_unix_socket_works(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/echo.sock"
    async with echoing(listen=address) as (server, stub):
        assert server.address == address
        assert await stub.unary(HELLO) == HELLO


async def test_ports_on_ipv6_work() -> None:
    async with serving(listen="[::1]:0", metrics_listen="[::1]:0") as server, calling(server) as stub:
        assert await stub.unary(HELLO) == HELLO
        assert server.metrics_http.address.startswith("[::1]:")
        assert ("grpc_server_started_total", "unary/Unary") in await scrape(server)


async def test_a_port_that_is_taken_is_an_error() -> None:
    async with serving() as server:
        second = MeshServer(ServerConfig(listen=server.address), Metrics("second"))
        with pytest.raises(RuntimeError, match=server.address):
            await second.start()
        await second.stop()


async def test_openmetrics_is_spoken_to_those_who_ask_and_nonsense_is_survived() -> None:
    async with serving() as server:
        host, port = server.metrics_http.address.split(":")

        async def ask(accept: str) -> bytes:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /metrics?x=1 HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode("latin-1"))
            answer = await reader.read()
            writer.close()
            return answer

        assert b"# EOF" in await ask("application/openmetrics-text; version=1.0.0")
        assert (await ask("application/openmetrics-text; version=\xff;;=")).startswith(b"HTTP/1.0 ")
        assert b" 200 " in await ask("*/*")


async def test_a_failing_route_answers_500(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        server._loop = None  # as before the start
        assert (await http(server.admin_http.address, "/drain"))[0] == 500
        assert (await http(server.admin_http.address, "/nothing"))[0] == 404
    assert "the server has not started" in caplog.text


@pytest.mark.parametrize("how", ["serving", "loading"])
@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_process_gracefully(how: str, name: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.support.signalled", str(int(name)), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


async def test_a_start_that_fails_stops_what_had_started() -> None:
    async with serving() as other:
        server = Recorded(hangs=False)
        server._config = ServerConfig(listen=other.address)
        with pytest.raises(RuntimeError):
            await serve(lambda: server)
    assert server.stopped.is_set()


@asynccontextmanager
async def _closed(call: Call) -> AsyncIterator[None]:
    raise Unauthenticated("CREDENTIALS_MISSING", "an API key is needed")
    yield


@pytest.mark.parametrize("method", ["Unary", "ServerStream"])
async def test_who_is_refused_hears_so_before_any_message_is_read(method: str) -> None:
    server = MeshServer(ServerConfig(), Metrics("echo"), layers=[_closed])
    server.add(add_echo, Echo(), NAME)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = channel.stream_stream(f"/{NAME}/{method}")(timeout=5)  # headers, and then nothing
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        await server.stop()


async def test_a_call_whose_message_does_not_come_ends_by_the_servers_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "_QUICK_SECONDS", 0.01)
    async with serving(request_timeout_seconds=0.01) as server, grpc.aio.insecure_channel(server.address) as channel:
        for path in (f"/{NAME}/Unary", "/grpc.health.v1.Health/Check"):
            call = channel.stream_stream(path)()
            async with asyncio.timeout(5):
                assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_that_ends_without_its_message_is_an_invalid_argument() -> None:
    async with echoing() as (server, _), grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(f"/{NAME}/Unary")(timeout=5)
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
