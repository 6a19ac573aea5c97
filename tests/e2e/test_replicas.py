"""Which replica gets a call, who is passed over, and how new and gone ones are noticed: against real servers."""

import asyncio
import contextlib
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from imagemesh.v1 import load_service_pb2, load_service_pb2_grpc
from imagemesh_runtime import discovery
from imagemesh_runtime.client import Peer
from imagemesh_runtime.discovery import Discovery, Resolver
from imagemesh_runtime.errors import InvalidArgument, MeshError, NotFinite, NotFound, Overloaded, Unavailable
from imagemesh_runtime.replicas import Replicas
from tests.support.echo import LIMIT, NAME, Echo, EchoStub, serving

HELLO = StringValue(value="hello")
Load = load_service_pb2.ReportLoadResponse


def connect(address: str, known_as: str = "") -> Peer:
    return Peer("echo", address, max_message_bytes=LIMIT, shares_memory=False)


def fails(error: Callable[[], Exception]) -> Echo:
    async def unary(request: StringValue, context: Any) -> StringValue:
        raise error()

    return Echo(unary=unary)


@asynccontextmanager
async def fleet(*echoes: Echo, **settings: Any) -> AsyncIterator[tuple[Replicas, list[Any]]]:
    """A server each, and their replicas as a client has them."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(echo)) for echo in echoes]
        replicas = Replicas([connect(server.address) for server in servers], 60.0, **settings)
        stack.push_async_callback(replicas.close)
        yield replicas, servers


async def say(replicas: Replicas, times: int) -> Counter[str]:
    """How many calls came out how."""
    method, outcomes = EchoStub(replicas.channel).unary, Counter[str]()
    for _ in range(times):
        try:
            outcomes[(await replicas.unary(method, HELLO)).value] += 1
        except MeshError as error:
            outcomes[error.code.name] += 1
    return outcomes


def answers(word: str) -> Echo:
    async def unary(request: StringValue, context: Any) -> StringValue:
        return StringValue(value=word)

    return Echo(unary=unary)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


async def test_calls_are_spread_and_those_that_meet_an_absent_replica_are_made_at_another() -> None:
    async with fleet(answers("a"), answers("b")) as (replicas, servers):
        assert set(await say(replicas, 40)) == {"a", "b"}
        await servers[0].stop()
        assert await say(replicas, 10) == {"b": 10}


async def test_one_that_answers_everything_with_errors_is_passed_over_although_it_is_quick() -> None:
    rests: list[int] = []
    broken = fails(lambda: ZeroDivisionError("its device is broken"))
    async with fleet(answers("a"), broken, note_rest=lambda: rests.append(1)) as (replicas, _):
        outcomes = await say(replicas, 60)
        assert outcomes["INTERNAL"] == 3
        assert outcomes["a"] == 57
        assert len(rests) == 1


@pytest.mark.parametrize("error", [InvalidArgument("value", "x", "y"), NotFinite("m", "latents")])
async def test_errors_of_the_requests_own_making_count_against_nobody(error: MeshError) -> None:
    wrong = fails(lambda: error)
    async with fleet(wrong, wrong) as (replicas, _):
        assert await say(replicas, 20) == {error.code.name: 20}
        assert not any(map(replicas.rests, replicas.peers))


async def test_what_is_too_much_for_one_is_given_to_another() -> None:
    full = fails(lambda: Overloaded("q", 1, 1.0))
    async with fleet(full, answers("b")) as (replicas, _):
        assert await say(replicas, 20) == {"b": 20}
    async with fleet(full, full) as (replicas, _):
        assert await say(replicas, 1) == {"RESOURCE_EXHAUSTED": 1}


async def test_one_that_has_the_model_is_found_among_many_that_lack_it() -> None:
    lacks = fails(lambda: NotFound("model", "m", ["other"]))
    async with fleet(lacks, lacks, lacks, answers("e"), lacks) as (replicas, _):
        assert await say(replicas, 10) == {"e": 10}
        assert not any(map(replicas.rests, replicas.peers))
    async with fleet(lacks, lacks) as (replicas, _):
        assert await say(replicas, 1) == {"NOT_FOUND": 1}


async def test_calls_of_a_service_that_keeps_something_stay_with_one_replica_and_are_made_once() -> None:
    heard: list[str] = []

    def away(name: str) -> Echo:
        async def unary(request: StringValue, context: Any) -> StringValue:
            heard.append(name)
            if name == "a":
                raise Unavailable("echo", "is going away")
            return request

        return Echo(unary=unary)

    async with fleet(away("a"), away("b"), keeping=(NAME,)) as (replicas, _):
        assert await say(replicas, 3) == {"UNAVAILABLE": 3}
        assert heard == ["a"] * 3
        replicas.part(replicas.peers[0])
        assert await say(replicas, 2) == {"hello": 2}


def streams(name: str) -> Echo:
    async def server_stream(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        yield request
        yield StringValue(value=name)

    return Echo(server_stream=server_stream)


async def test_a_stream_comes_whole_from_one_replica_and_that_of_a_kept_service_always_from_the_same() -> None:
    async def hear(replicas: Replicas) -> tuple[str, ...]:
        async with contextlib.aclosing(replicas.stream(EchoStub(replicas.channel).server_stream, HELLO)) as answers:
            return tuple([answer.value async for answer in answers])

    async with fleet(streams("a"), streams("b")) as (replicas, _):
        assert {await hear(replicas) for _ in range(20)} == {("hello", "a"), ("hello", "b")}
    async with fleet(streams("a"), streams("b"), keeping=(NAME,)) as (replicas, servers):
        assert {await hear(replicas) for _ in range(10)} == {("hello", "a")}
        await servers[0].stop()
        with pytest.raises(MeshError) as failed:
            await hear(replicas)
        assert failed.value.code is grpc.StatusCode.UNAVAILABLE
        assert replicas.rests(replicas.peers[0])


async def test_what_all_are_to_do_is_asked_of_all_and_one_that_fails_is_told() -> None:
    async with fleet(answers("a"), answers("b")) as (replicas, _):
        told = await replicas.everywhere(EchoStub(replicas.channel).unary, HELLO)
        assert [answer.value for answer in told] == ["a", "b"]
    async with fleet(answers("a"), fails(lambda: InvalidArgument("value", "x", "y"))) as (replicas, _):
        with pytest.raises(MeshError, match="value"):
            await replicas.everywhere(EchoStub(replicas.channel).unary, HELLO)


def standing(*loads: Load | None) -> Replicas:
    """Replicas that said so of themselves; nobody is called."""
    replicas = Replicas([connect(f"127.0.0.1:{port + 1}") for port in range(len(loads))], 60.0)
    for peer, load in zip(replicas.peers, loads, strict=True):
        if load is not None:
            replicas.note_load(peer, load)
    return replicas


def picks(replicas: Replicas, amount: float = 1.0) -> list[float]:
    """How often each is picked of 200 times, as shares."""
    found = Counter(replicas.peers.index(replicas.pick(amount=amount)) for _ in range(200))
    return [found[i] / 200 for i in range(len(replicas.peers))]


async def test_less_work_counts_for_more_than_fewer_requests() -> None:
    slow, quick = Load(ready=True, requests=1, backlog_seconds=60), Load(ready=True, requests=20, backlog_seconds=5)
    assert picks(standing(slow, quick)) == [0, 1]


async def test_of_three_the_heaviest_gets_nothing_and_the_lightest_most() -> None:
    shares = picks(standing(*[Load(ready=True, requests=1, backlog_seconds=seconds) for seconds in (3, 9, 1)]))
    assert shares[1] == 0
    assert shares[2] > shares[0] > 0


async def test_work_sent_since_a_replica_said_its_load_counts_as_such_work_took_it_and_so_does_what_is_to_be_sent() -> (
    None
):
    replicas = standing(None, None)
    quick, slow = replicas.peers
    with replicas.work_on(quick, 2.0), replicas.work_on(slow, 1.0):  # 5 s for an amount of 1, and 16 s
        replicas.note_load(quick, Load(ready=True, requests=2, backlog_seconds=10))
        replicas.note_load(slow, Load(ready=True, requests=1, backlog_seconds=16))
        assert picks(replicas) == [1, 0]
        with replicas.work_on(quick, 4.0):  # 30 s
            assert picks(replicas) == [0, 1]
            assert picks(replicas, amount=10.0) == [1, 0], "30 + 50 s are less than 16 + 160 s"
        assert picks(replicas) == [1, 0]


async def test_where_one_does_not_know_its_seconds_requests_are_compared() -> None:
    assert picks(standing(Load(ready=True, requests=3, backlog_seconds=1), Load(ready=True, requests=2))) == [0, 1]
    replicas = standing(None, None)
    with replicas.work_on(replicas.peers[0]):
        assert picks(replicas) == [0, 1]


async def test_one_that_drains_is_picked_only_when_there_is_nobody_else() -> None:
    assert picks(standing(Load(ready=False), Load(ready=True, requests=50, backlog_seconds=500))) == [0, 1]
    assert sum(picks(standing(Load(ready=False), Load(ready=False)))) == 1


class Names:
    """A resolver that says what the test wants."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] | Exception = addresses

    async def __call__(self, host: str) -> Sequence[str]:
        if isinstance(self.addresses, Exception):
            raise self.addresses
        return self.addresses


@asynccontextmanager
async def discovered(names: Names, port: int) -> AsyncIterator[Discovery]:
    found = Discovery("echo", f"dns:///replicas:{port}", connect, resolve_seconds=0.02, resolve=names)
    await found.start()
    try:
        yield found
    finally:
        await found.close()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("0.0.0.0", 0))
        port: int = one.getsockname()[1]
        return port


async def test_a_new_replica_takes_work_at_once_and_a_gone_one_ends_what_it_was_at() -> None:
    port, go = free_port(), asyncio.Event()

    async def slowly(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        await go.wait()
        yield StringValue(value="last")

    old, new = answers("old"), answers("new")
    old.server_stream = slowly  # type: ignore[method-assign]
    names = Names("127.0.0.2")
    async with (
        serving(old, listen=f"127.0.0.2:{port}"), serving(new, listen=f"127.0.0.3:{port}"),
        discovered(names, port) as found,
    ):  # fmt: skip
        replicas = found.replicas
        assert await say(replicas, 5) == {"old": 5}
        peer = replicas.pick()
        with replicas.work_on(peer):
            stream = EchoStub(peer.channel).server_stream(HELLO)
            assert (await stream.read()).value == "first"
            names.addresses = ("127.0.0.2", "127.0.0.3")
            await until(lambda: len(replicas.peers) == 2)
            assert (await say(replicas, 20))["new"] > 0
            names.addresses = ("127.0.0.3",)
            await until(lambda: len(replicas.peers) == 1)
            assert await say(replicas, 10) == {"new": 10}
            go.set()
            assert (await stream.read()).value == "last"
            assert await stream.code() is grpc.StatusCode.OK
        await until(lambda: peer.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN)


async def test_a_name_that_cant_be_resolved_for_a_while_takes_nobody_away(caplog: pytest.LogCaptureFixture) -> None:
    port, names = free_port(), Names("127.0.0.2")
    async with serving(listen=f"127.0.0.2:{port}"), discovered(names, port) as found:
        names.addresses = socket.gaierror("no answer")
        await until(lambda: "can't be resolved" in caplog.text)
        await asyncio.sleep(0.1)
        assert caplog.text.count("can't be resolved") == 1
        assert await say(found.replicas, 3) == {"hello": 3}


async def test_where_nobody_is_known_the_service_is_named() -> None:
    async with discovered(Names(), 1) as found:
        with pytest.raises(Unavailable, match="echo: no replica of it is known"):
            await found.replicas.unary(EchoStub(found.replicas.channel).unary, HELLO)


async def test_one_that_drains_gets_no_more_work_and_one_that_comes_back_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_LOAD_SECONDS", 0.05)
    async with serving(answers("a")) as one, serving(answers("b")) as other:
        found = Discovery("echo", f"{one.address},{other.address}", connect)
        await found.start()
        try:
            await one.set_ready(False)
            await until(lambda: not found.replicas._known[found.replicas.peers[0]].ready)
            assert await say(found.replicas, 20) == {"b": 20}
            await one.set_ready(True)
            await until(lambda: found.replicas._known[found.replicas.peers[0]].ready)
            assert (await say(found.replicas, 40))["a"] > 0
        finally:
            await found.close()


async def test_a_server_tells_what_its_metrics_tell() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = load_service_pb2_grpc.LoadServiceStub(channel)

        async def told() -> Load:
            return await stub.ReportLoad(load_service_pb2.ReportLoadRequest())

        assert await told() == Load(ready=True)
        server.metrics.pending.set(2)
        server.metrics.running.set(1)
        assert await told() == Load(ready=True, requests=3)
        backlog = server.metrics.backlog.labels("echo")
        assert await told() == Load(ready=True, requests=3), "an engine that has measured nothing says 0"
        backlog.set(7.5)
        assert await told() == Load(ready=True, requests=3, backlog_seconds=7.5)
        await server.set_ready(False)
        assert not (await told()).ready


async def test_the_machines_resolver_is_asked() -> None:
    resolver = Resolver()
    assert "127.0.0.1" in await resolver("localhost")
    resolver.close()


async def test_a_resolver_that_hangs_holds_one_thread_and_none_of_the_event_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, go = list[str](), threading.Event()

    def hangs(host: str, *_: Any, **__: Any) -> Any:
        asked.append(threading.current_thread().name)
        go.wait(60)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    monkeypatch.setattr(discovery, "_RESOLVING_SECONDS", 0.05)
    found = Discovery("echo", "dns:///replicas:1", connect, resolve_seconds=60)
    try:
        await found.start()
        for _ in range(3):
            await found._look_up()
        assert len(asked) == 1
        assert asked[0].startswith("resolver")
    finally:
        go.set()
        await found.close()


@pytest.mark.parametrize(
    "addresses", ["", " , ", "dns:///", "dns:///host", "dns:///unix:/x", "dns:///host:0", "http://x:1"]
)
def test_what_is_no_address_is_refused(addresses: str) -> None:
    with pytest.raises(InvalidArgument):
        Discovery("echo", addresses, connect)
