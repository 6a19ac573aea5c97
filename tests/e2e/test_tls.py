"""TLS between services and for clients, with certificates that are renewed while all of them run."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from google.protobuf.wrappers_pb2 import StringValue
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from imagemesh_cli.host import MeshHost
from imagemesh_cli.main import main
from imagemesh_cli.rooms import SERVICES, configure
from imagemesh_client import Client, MeshError
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.service import create
from imagemesh_runtime import tls
from imagemesh_runtime.client import Peer
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.discovery import Discovery
from imagemesh_runtime.errors import FailedPrecondition, Unavailable
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.server import MeshServer
from imagemesh_runtime.tls import Certificates, TlsFiles
from tests.support.echo import LIMIT, Echo, EchoStub, serving
from tests.support.mesh import event_loop, running_mesh

HELLO = StringValue(value="hello")


class Folder:
    """An authority, and the files of somebody whom it knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.authority, self.certificate, self.key = (path / f"{name}.pem" for name in ("ca", "chain", "key"))
        self.renew(trustme.CA())

    def renew(self, ca: trustme.CA) -> None:
        """Take another authority's certificate; whole files, as those who renew certificates do it."""
        self.ca = ca
        made = ca.issue_cert("127.0.0.1", "localhost")
        for path, text in (
            (self.authority, ca.cert_pem.bytes()),
            (self.key, made.private_key_pem.bytes()),
            (self.certificate, b"".join(one.bytes() for one in made.cert_chain_pems)),
        ):
            put(path, text)

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(str(self.certificate), str(self.key), str(self.authority))

    @property
    def settings(self) -> dict[str, str]:
        """Of a server that asks for certificates too, and of what it calls."""
        return {
            "tls_certificate": str(self.certificate), "tls_key": str(self.key),
            "tls_client_authority": str(self.authority), "tls_authority": str(self.authority),
        }  # fmt: skip


def put(path: Path, text: bytes) -> None:
    path.with_suffix(".new").write_bytes(text)
    os.replace(path.with_suffix(".new"), path)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "tls")


@pytest.fixture
def other(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "other")


@pytest.fixture(autouse=True)
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at files does so each time."""
    monkeypatch.setattr(tls, "_LOOK_SECONDS", 0.0)


@asynccontextmanager
async def peer_of(address: str, files: TlsFiles) -> AsyncIterator[Any]:
    peer = Peer("echo", address, max_message_bytes=LIMIT, tls=files)
    stub = EchoStub(peer.channel)
    try:
        yield lambda: peer.unary(stub.unary, HELLO, timeout_seconds=5)
    finally:
        await peer.close()


async def test_calls_come_by_tls_with_a_certificate_of_the_authority_alone(folder: Folder, other: Folder) -> None:
    ca, mine = str(folder.authority), folder.files
    async with serving(**folder.settings) as server:
        async with peer_of(server.address, mine) as call:
            assert (await call()).value == "hello"
        theirs = TlsFiles(str(other.certificate), str(other.key), ca)
        stranger = TlsFiles(mine.certificate, mine.key, str(other.authority))
        for files in (TlsFiles(), TlsFiles(authority=ca), theirs, stranger):
            async with peer_of(server.address, files) as call:
                with pytest.raises(Unavailable):
                    await call()


async def test_without_an_authority_for_callers_they_need_no_certificate(folder: Folder) -> None:
    files = {name: folder.settings[name] for name in ("tls_certificate", "tls_key")}
    async with serving(**files) as server, peer_of(server.address, TlsFiles(authority=str(folder.authority))) as call:
        assert (await call()).value == "hello"


async def test_sockets_of_this_machine_stay_plain(folder: Folder, tmp_path: Path) -> None:
    server = serving(listen=f"unix:{tmp_path}/s", **folder.settings)
    async with server, peer_of(f"unix:{tmp_path}/s", folder.files) as call:
        assert (await call()).value == "hello"


async def test_renewed_certificates_count_at_both_ends_and_calls_under_way_go_on(folder: Folder, other: Folder) -> None:
    said: asyncio.Queue[StringValue] = asyncio.Queue()

    async def slowly(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        while True:
            yield await said.get()

    async with serving(Echo(server_stream=slowly), **folder.settings) as server:
        peer = Peer("echo", server.address, max_message_bytes=LIMIT, tls=folder.files)
        stub = EchoStub(peer.channel)
        before = Peer("echo", server.address, max_message_bytes=LIMIT, tls=_copy(folder, other.path))
        stream = peer.stream(stub.server_stream, HELLO)
        said.put_nowait(HELLO)
        assert (await anext(stream)).value == "hello"
        folder.renew(trustme.CA())
        assert (await peer.unary(stub.unary, HELLO, timeout_seconds=10)).value == "hello"
        with pytest.raises(Unavailable):  # it knows the authority of before, and is known by it
            await before.unary(EchoStub(before.channel).unary, HELLO, timeout_seconds=5)
        said.put_nowait(HELLO)
        assert (await anext(stream)).value == "hello"
        await stream.aclose()
        await before.close()
        await peer.close()


def _copy(folder: Folder, to: Path) -> TlsFiles:
    """The same files under other names, which stay as they are."""
    names = (folder.certificate, folder.key, folder.authority)
    copies = [to / f"copy-{path.name}" for path in names]
    for path, copy in zip(names, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    return TlsFiles(*map(str, copies))


def test_files_that_do_not_fit_together_change_nothing_until_they_do(
    folder: Folder, other: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = Certificates(folder.files)
    first = certificates.current()
    put(folder.key, other.key.read_bytes())
    assert certificates.current() is certificates.current() is first
    assert caplog.text.count("the certificates of before go on to count") == 1
    put(folder.certificate, other.certificate.read_bytes())
    now = certificates.current()
    assert (now.version, now.key) == (1, other.key.read_bytes())
    folder.authority.unlink()
    assert certificates.current() is now


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tls_certificate": "/nowhere.pem"}, "TLS by /nowhere.pem.*No such file"),
        ({"tls_key": ""}, "tls_certificate and tls_key belong together"),
        ({"tls_certificate": "", "tls_key": ""}, "tls_client_authority needs tls_certificate"),
        ({"tls_client_authority": "KEY"}, "TLS by .*"),
        ({"tls_client_authority": "system"}, "tls_client_authority must be a PEM file .*, got 'system'"),
    ],
)
def test_what_cannot_be_served_with_is_refused_at_the_start(folder: Folder, change: Any, complaint: str) -> None:
    settings = {**folder.settings, **{name: value.replace("KEY", str(folder.key)) for name, value in change.items()}}
    with pytest.raises(FailedPrecondition, match=complaint):
        MeshServer(ServerConfig(**settings), Metrics("x"))  # type: ignore[arg-type]


@pytest.fixture
def gateway(folder: Folder) -> Iterator[Any]:
    """A gateway without services, by TLS."""
    free = {"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0", "drain_grace_seconds": "1"}
    with event_loop() as loop:

        async def start() -> Any:
            server = create(configure(GatewayConfig, {**free, **folder.settings}))
            await server.start()
            return server

        server = loop.run(start())
        try:
            yield server
        finally:
            loop.run(server.stop())


def context_of(folder: Folder, shows: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(folder.authority))
    if shows:
        context.load_cert_chain(folder.certificate, folder.key)
    return context


def get(gateway: Any, context: ssl.SSLContext) -> int:
    with httpx.Client(verify=context, timeout=10) as client:
        return client.get(f"https://{gateway.http_address}/healthz").status_code


def test_http_comes_by_tls_with_a_certificate_too_and_renews_it(gateway: Any, folder: Folder, other: Folder) -> None:
    known, before = context_of(folder), _copy(folder, other.path)
    assert get(gateway, known) == 200
    with pytest.raises(InvalidStatus):
        connect(f"wss://{gateway.http_address}/v1/jobs/x/socket", ssl=known)
    with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
        get(gateway, context_of(folder, shows=False))
    with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
        httpx.get(f"http://{gateway.http_address}/healthz")
    folder.renew(trustme.CA())
    assert get(gateway, context_of(folder)) == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        get(gateway, known)
    # Who trusts the new authority, but is known by the old one alone, is not let in.
    half = ssl.create_default_context(cafile=str(folder.authority))
    half.load_cert_chain(before.certificate, before.key)
    with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
        get(gateway, half)


def test_the_whole_mesh_by_mutual_tls(
    folder: Folder, other: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane("vit")
    with event_loop() as loop:

        async def start() -> Any:
            free = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0"}
            room = SERVICES["vit"]
            vit = room.create(configure(room.config(), {**free, "backend": "fake", **folder.settings}), lane)
            await vit.start()
            return vit

        vit = loop.run(start())
        try:
            gateway = {"vit": vit.address, "drain_grace_seconds": "1", **folder.settings}
            with running_mesh(gateway, without=["vit"], backend="fake") as host:
                _as_a_client(host, folder, other, capsys, monkeypatch)
        finally:
            loop.run(vit.stop())
            lane.close()


def _as_a_client(
    host: MeshHost, folder: Folder, other: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "tls_authority": folder.authority, "tls_certificate": folder.certificate, "tls_key": folder.key,
    }  # fmt: skip
    with Client(host.grpc_address, **files) as client:
        assert "vit" in {model.role for model in client.models().models}
        folder.renew(trustme.CA())
        assert "vit" in {model.role for model in client.models().models}
    for wrong in ({}, files | {"tls_authority": other.authority}):
        with Client(host.grpc_address, timeout=5, **wrong) as client, pytest.raises(MeshError) as caught:
            client.models()
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    options = [f"--{name.replace('_', '-')}={path}" for name, path in files.items()]
    assert main(["models", "--server", host.grpc_address, *options]) == 0
    for name, path in files.items():
        monkeypatch.setenv(f"IMAGEMESH_{name.upper()}", str(path))
    assert main(["models", "--server", host.grpc_address]) == 0
    assert capsys.readouterr().out.count("fake") >= 2


class Replica:
    """A folder's authority, and a certificate of it for a name that no address has."""

    def __init__(self, folder: Folder, name: str) -> None:
        made = folder.ca.issue_cert(name)
        put(folder.key, made.private_key_pem.bytes())
        put(folder.certificate, b"".join(one.bytes() for one in made.cert_chain_pems))


async def test_replicas_behind_a_name_are_called_at_their_addresses_and_shown_to_be_of_that_name(
    folder: Folder,
) -> None:
    Replica(folder, "echo-replicas")
    server_settings = {key: value for key, value in folder.settings.items() if key != "tls_authority"}

    def connect(address: str, known_as: str) -> Peer:
        return Peer("echo", address, max_message_bytes=LIMIT, shares_memory=False, tls=folder.files, known_as=known_as)

    async def resolve(host: str) -> list[str]:
        return ["127.0.0.1"]

    async with serving(**server_settings) as server:
        port = server.address.rpartition(":")[2]
        for name, reached in (("echo-replicas", True), ("somebody-else", False)):
            found = Discovery("echo", f"dns:///{name}:{port}", connect, resolve=resolve)
            await found.start()
            try:
                call = found.replicas.unary(EchoStub(found.replicas.channel).unary, HELLO)
                if reached:
                    assert await call == HELLO
                else:
                    with pytest.raises(Unavailable):
                        await call
            finally:
                await found.close()
