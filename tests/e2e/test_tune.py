"""From ``imagemesh tune`` to the rows that the engine computes together, and what the service says of them."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh.v1 import model_service_pb2, model_service_pb2_grpc
from imagemesh_cli.main import main
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Finished
from imagemesh_services.diffusion.knees import Knee, read_knees, write_knees
from imagemesh_services.diffusion.service import create
from tests.e2e.test_step_batching import Counting
from tests.support import tiny_sdxl
from tests.support.services import Served, serving
from tests.support.tiny_models import build_inpainting, build_stable_diffusion

KIND = ("fake", 64, 64)


async def crowd(engine: Engine, model: Counting, count: int = 8) -> None:
    """So many generations at once, to their end."""

    async def one(seed: int) -> None:
        embeds = np.ones((1, 8, 4), dtype=np.float32)
        inputs = SampleInputs({"prompt_embeds": embeds}, 64, 64, 3, 1.0, None, (seed,))
        assert isinstance([event async for event in engine.sample(model, inputs)][-1], Finished)

    await asyncio.gather(*(one(seed) for seed in range(count)))


@pytest.mark.parametrize(
    ("tuned", "ticks", "largest"), [({KIND: 3}, (), 3), ({}, (1, 2, 4), 4), ({KIND: 3}, (1, 2, 4), 3), ({}, (), 6)]
)
async def test_no_forward_is_larger_than_the_knee(tuned: Mapping[object, int], ticks: tuple[int], largest: int) -> None:
    lane, model = Lane("test"), Counting()
    engine = Engine(lane, Metrics("diffusion"), max_rows=6, max_queue=8, tuned=tuned)
    for rows in ticks:
        for _ in range(8):
            engine._pace.note(KIND, rows, 0.01 * rows + 0.001)  # 1 / 30 of a row: the knee is at 4
    await crowd(engine, model)
    assert max(model.forwards) == largest
    await engine.close()
    lane.close()


async def told(served: Served) -> dict[str, str]:
    stub = model_service_pb2_grpc.ModelServiceStub(served.channel)
    (info,) = (await stub.ListServedModels(model_service_pb2.ListServedModelsRequest())).models
    return {name: value for name, value in info.properties.items() if name.startswith("max_rows")}


async def sample(served: Served, side: int = 64) -> None:
    embeds = {"prompt_embeds": to_proto(np.ones((1, 8, 4), dtype=np.float32))}
    request = pb.SampleRequest(model="fake", conditioning=embeds, width=side, height=side, steps=2, seeds=[1])
    assert [event async for event in rpc.DiffusionServiceStub(served.channel).Sample(request)]


async def test_the_service_says_which_limit_is_in_force_and_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "knees.json"
    write_knees(
        path,
        [
            Knee("fake", "cpu", "float32", 64, 64, 5, 0.1, 0.01),
            Knee("fake", "cpu", "float32", 128, 128, 40, 0.1, 0.1),
            Knee("another's", "cpu", "float32", 256, 256, 1, 0.1, 0.0),
        ],
    )
    config = DiffusionConfig(listen="127.0.0.1:0", backend="fake", max_batch=12, knees_file=str(path))
    async with serving(create, config) as served:
        assert await told(served) == {}  # what is not loaded has no fingerprint yet
        await sample(served)
        assert await told(served) == {
            "max_rows": "5",
            "max_rows_from": "tune",
            "max_rows_by_size": "64x64: 5 tune, 128x128: 12 max_batch",
        }


async def test_without_a_measurement_the_bound_is_in_force_and_said_to_be(tmp_path: Path) -> None:
    config = DiffusionConfig(listen="127.0.0.1:0", backend="fake", knees_file=str(tmp_path / "none.json"))
    async with serving(create, config) as served:
        await sample(served, side=128)
        rows = str(config.max_batch)
        by_size = f"128x128: {rows} max_batch"
        assert await told(served) == {"max_rows": rows, "max_rows_from": "max_batch", "max_rows_by_size": by_size}


def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> int:
    monkeypatch.setenv("IMAGEMESH_DIFFUSION_KNEES_FILE", str(tmp_path / "knees.json"))
    return main(["tune", *options])


def test_tune_puts_what_it_measured_on_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--size", "64x64", "--size", "64x32"]
    options = ["--models", str(models), "--max-rows", "2", "--rounds", "1"]
    assert tune(monkeypatch, tmp_path, "tiny-sd", *sizes, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "SIZE", "ROWS", "MS", "A", "ROW", "MS", "A", "FORWARD", "LIMITED", "BY"]
    assert [line.split()[:2] for line in lines[1:3]] == [["tiny-sd", "64x64"], ["tiny-sd", "64x32"]]
    first, second = read_knees(tmp_path / "knees.json")
    assert first.fingerprint == second.fingerprint
    assert (second.device, second.dtype, second.width, second.height) == ("cpu", "float32", 64, 32)
    assert {first.rows, second.rows} <= {1, 2}


def test_tune_knows_what_models_of_every_family_want_to_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "models"
    tiny_sdxl.build_sdxl(root / "tiny-sdxl")
    tiny_sdxl.build_refiner(root / "tiny-refiner")
    build_stable_diffusion(root / "tiny-sd")
    build_inpainting(root / "tiny-inpainting", root / "tiny-sd")
    assert tune(monkeypatch, tmp_path, "--models", str(root), "--max-rows", "1", "--rounds", "1", "--json") == 0
    names = {one["model"] for one in json.loads(capsys.readouterr().out)}
    assert names == {"tiny-sdxl", "tiny-refiner", "tiny-sd", "tiny-inpainting"}


def test_tune_tells_a_script_all_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(monkeypatch, tmp_path, "--backend", "fake", "--rounds", "2", "--max-rows", "1", "--json") == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert (only["model"], only["rows"], list(only["seconds"])) == ("fake", 1, ["1"])
    assert only["seconds"]["1"] > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["no-such"], "no-such"), (["--size", "63x64"], "63"), (["--backend", "abacus"], "abacus")],
)
def test_what_cannot_be_measured_is_named_and_nothing_is_written(
    options: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tune(monkeypatch, tmp_path, "--backend", "fake", *options) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "knees.json").exists()
