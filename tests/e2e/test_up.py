"""All services and the gateway in one process, started as users start them."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from imagemesh.v1 import gateway_service_pb2, gateway_service_pb2_grpc, image_pb2
from imagemesh_cli.host import MeshHost
from imagemesh_cli.rooms import SERVICES, configure
from imagemesh_client import AsyncClient, Client, Control, Unavailable
from imagemesh_gateway.config import GatewayConfig
from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.tensors import to_proto

FREE = {"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0"}
NAMES = ["controlnet", "diffusion", "text-encoder", "vae", "vit"]


def fake_mesh(**gateway: str) -> MeshHost:
    return MeshHost.configured({"backend": "fake"}, {**FREE, **gateway})


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the mesh makes its folder; pytest's own paths are too long for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


async def test_a_prompt_comes_out_as_the_picture_worked_out_by_hand() -> None:
    async with fake_mesh() as mesh, AsyncClient(mesh.grpc_address) as client:
        generation = await client.generate("hi", guidance=1.0, steps=4, width=64, height=64, seed=5)
    # "hi" is the tokens 1, 104, 105 and five times 2 over 256; the latents become their mean x, the picture x + 0.5.
    value = round((220 / 8 / 256 + 0.5) * 255)
    np.testing.assert_array_equal(np.asarray(generation.images[0].to_pil()), np.full((64, 64, 3), value))
    assert generation.parameters.backends == {"text-encoder": "fake", "diffusion": "fake", "vae": "fake"}
    assert [timing.stage for timing in generation.timings] == ["text-encoder", "diffusion", "vae"]


async def test_every_service_of_the_mesh_answers() -> None:
    async with fake_mesh() as mesh, AsyncClient(mesh.grpc_address) as client:
        models = await client.models()
        picture = np.zeros((64, 64, 3), dtype=np.uint8)
        plain = await client.generate("hi", steps=2, guidance=1.0, seed=5)
        controlled = await client.generate("hi", steps=2, guidance=1.0, seed=5, controls=[Control(picture + 51)])
        (answer,) = await client.classify(picture)
        embeddings = await client.embed([picture, picture])
    assert (sorted(model.role for model in models), models.unreachable) == (NAMES, ())
    # The control adds its picture's brightness, a fifth, to every latent and so to every pixel.
    before, after = (np.asarray(made.images[0].to_pil(), dtype=int) for made in (plain, controlled))
    assert set((after - before).ravel()) == {51}
    assert (answer.model, answer.backend) == ("fake", "fake")
    assert len(embeddings) == 2


async def test_every_scheduler_and_guider_that_is_told_of_can_be_had() -> None:
    async with fake_mesh() as mesh, AsyncClient(mesh.grpc_address) as client:
        told = await client.sampling()
        for choice in told.schedulers:
            await client.generate("hi", steps=1, guidance=1.0, scheduler=choice.name)
    assert len(told.schedulers) == 59
    assert {"CFG", "APG", "PAG"} <= {choice.name for choice in told.guiders}
    assert {choice.name: choice.class_name for choice in told.schedulers}[
        "Euler a"
    ] == "EulerAncestralDiscreteScheduler"


async def test_an_embedding_names_the_model_and_what_ran_it() -> None:
    async with fake_mesh() as mesh, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        picture = image_pb2.Image(pixels=to_proto(np.zeros((8, 8, 3), dtype=np.uint8)))
        request = gateway_service_pb2.EmbedRequest(images=[picture])
        answer = await gateway_service_pb2_grpc.GatewayServiceStub(channel).Embed(request)
    assert (answer.model, answer.backend) == ("fake", "fake")


async def test_services_listen_where_no_other_user_can_enter(temporary: Path) -> None:
    async with fake_mesh() as mesh:
        (name,) = os.listdir(temporary)
        folder = temporary / name
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert {server.address for server in mesh.services.values()} == {f"unix:{folder}/{name}.sock" for name in NAMES}
    assert os.listdir(temporary) == []


async def test_sockets_have_short_paths_even_where_temporary_files_have_long_ones(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = temporary / ("long" * 25)
    os.mkdir(long)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    async with fake_mesh() as mesh, AsyncClient(mesh.grpc_address) as client:
        assert (await client.models()).unreachable == ()
    assert os.listdir(long) == []


def lanes() -> set[threading.Thread]:
    """The compute threads of this process: tests of hanging devices that ran before leave theirs for good."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("lane-")}


async def test_all_services_share_one_compute_thread() -> None:
    before = lanes()
    async with fake_mesh() as mesh, AsyncClient(mesh.grpc_address) as client:
        await client.generate("hi", steps=2)
        await client.classify(np.zeros((8, 8, 3), dtype=np.uint8))
        (lane,) = lanes() - before
    assert not lane.is_alive()


async def test_every_server_says_that_it_is_ready() -> None:
    async with fake_mesh() as mesh:
        servers = [*mesh.services.values(), mesh.gateway]
        urls = [f"http://{server.metrics_http.address}/readyz" for server in servers]
        urls.append(f"http://{mesh.http_address}/readyz")
        assert [await asyncio.to_thread(status_of, url) for url in urls] == [200] * 7


def status_of(url: str) -> int:
    with urlopen(url) as response:
        return int(response.status)


async def test_after_the_end_nobody_listens() -> None:
    async with fake_mesh() as mesh:
        pass
    async with AsyncClient(mesh.grpc_address) as client:
        with pytest.raises(Unavailable):
            await client.models()


async def test_a_service_that_is_not_hosted_is_looked_for_where_the_configuration_says() -> None:
    services = [configure(room.config(), {"backend": "fake"}) for name, room in SERVICES.items() if name != "vit"]
    async with fake_mesh() as whole:
        gateway = configure(GatewayConfig, {**FREE, "vit": whole.services["vit"].address})
        async with MeshHost(services, gateway) as part, AsyncClient(part.grpc_address) as client:
            (answer,) = await client.classify(np.zeros((8, 8, 3), dtype=np.uint8))
    assert answer.model == "fake"


@pytest.mark.parametrize("face", ["listen", "http_listen"])
async def test_a_taken_port_is_told_and_leaves_nothing_behind(temporary: Path, face: str) -> None:
    before = lanes()
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FailedPrecondition, match=address):
            await fake_mesh(**{face: address}).__aenter__()
    assert os.listdir(temporary) == []
    assert lanes() <= before


@contextmanager
def running(
    *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "imagemesh_cli.main", *arguments]
    env = {**os.environ, **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_up_serves_until_it_is_told_to_stop(name: str) -> None:
    with running("up", "--backend", "fake", "--grpc-port", "0", "--http-port", "0", "--json") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        with Client(told["grpc"]) as client:
            assert client.generate("hi", steps=2).parameters.backends["vae"] == "fake"
        assert status_of(f"http://{told['http']}/readyz") == 200
        assert sorted(told["metrics"]) == sorted([*NAMES, "gateway"])
        process.send_signal(getattr(signal, name))
        rest, complaints = process.communicate(timeout=60)
    assert (process.returncode, rest, complaints) == (0, "", "")


def test_a_second_signal_ends_up_while_a_call_goes_on(temporary: Path) -> None:
    silent = threading.Event()

    def questions() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        silent.wait()

    arguments = ("up", "--backend", "fake", "--grpc-port", "0", "--http-port", "0", "--json")
    with running(*arguments, environment={"TMPDIR": str(temporary)}) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["grpc"]
        assert os.listdir(temporary) != []
        with grpc.insecure_channel(address) as channel:
            answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(questions())
            assert next(answers).list_services_response.service
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            _, complaints = process.communicate(timeout=20)  # the grace for calls under way is 30 s
        silent.set()
    assert (process.returncode, complaints, os.listdir(temporary)) == (130, "", [])


def test_up_says_where_it_listens() -> None:
    with running("up", "--backend", "fake", "--host", "localhost", "--grpc-port", "0", "--http-port", "0") as process:
        assert process.stdout is not None
        head = [process.stdout.readline() for _ in range(3)]
        process.terminate()
        process.communicate(timeout=60)
    assert head[0] == "imagemesh is up\n"
    assert head[1].split()[0] == "gRPC"
    assert head[2].split()[1].startswith("http://")


@pytest.mark.parametrize(("taken_port", "free_port"), [("--grpc-port", "--http-port"), ("--http-port", "--grpc-port")])
def test_up_on_a_taken_port_is_a_line_and_code_1(taken_port: str, free_port: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        with running("up", "--backend", "fake", taken_port, port, free_port, "0") as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert port in err


def test_up_without_its_models_is_a_line_and_code_2(tmp_path: Path) -> None:
    with running("up", "--models", str(tmp_path / "nowhere"), "--grpc-port", "0", "--http-port", "0") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "nowhere" in err


def test_one_service_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text('[vae]\nbackend = "fake"\n')
    address = f"unix:{tmp_path}/vae.sock"
    with running("serve", "vae", "--config", str(config), "--listen", address, "--set", "max-batch=3") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"vae listens on {address}\n"
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["serve", "vae", "--set", "sauce=hot"], "sauce"),
        (["serve", "vae", "--set", "max-batch=many"], "MAX_BATCH"),
        (["serve", "gateway", "--backend", "fake"], "backend"),
        (["serve", "vae", "--backend", "abacus"], "abacus"),
    ],
)
def test_a_wrong_setting_is_a_line_and_code_2(arguments: list[str], complaint: str) -> None:
    with running(*arguments) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert complaint in err


def test_a_config_file_that_is_no_toml_is_a_line_and_code_2(tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text("not toml")
    with running("serve", "vae", "--config", str(config)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "TOML" in err


def test_demo_leaves_a_picture_and_tells_what_each_hop_cost(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with running("demo", "--backend", "fake", "--out", str(folder)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    with Image.open(folder / "demo.png") as picture:
        assert picture.size == (64, 64)
    costs = {line.split()[0] for line in out.splitlines()}
    assert {"HOP", "text-encoder", "diffusion", "vae"} <= costs
    assert "fake sees: " in out
    assert os.listdir(folder) == ["demo.png"]
