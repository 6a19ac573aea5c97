"""The benchmarks that start the mesh: they run on a small model; nothing here depends on how long anything takes."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.bench import latency, memory
from tests.bench.harness import Figure, bootstrap
from tests.bench.up import Up
from tests.support.sizes import ROOT


def test_the_meshs_latency_is_compared_and_taken_apart(models: Path) -> None:
    figures = {figure.name.removeprefix("latency: "): figure for figure in latency.measure(models, 1, "tiny-sd")}
    ratio, fours = figures["mesh / in-process"], figures["mesh / in-process, ABBA, 95%"]
    assert (ratio.samples, fours.samples) == (latency.MORE, latency.MORE // 2)
    assert ratio.median > 0
    assert fours.low <= fours.median <= fours.high
    idle = figures["of a generation, the lane does not compute"]
    beside = figures["of a generation, CPU of all but the lane"]
    most = figures["so the mesh adds at most"]
    assert 0 < idle.median < 100
    assert beside.median > 0
    assert most.high >= max(idle.low, beside.low)


def test_another_number_of_threads_is_no_comparison() -> None:
    mesh = Up("", psutil.Process())
    with pytest.raises(RuntimeError, match="the mesh computes on 2 threads, the pipeline in this process on 3"):
        latency.require_threads(_Counted(mesh.address, mesh.process), 3)


class _Counted(Up):
    def lane_and_other_seconds(self) -> tuple[list[float], float]:
        return [9.0, 8.0, 0.01], 3.0


def test_the_meshs_memory_is_compared(models: Path) -> None:
    alone, mesh, ratio = memory.measure(models, 1, "tiny-sd")
    assert min(alone.median, mesh.median) > 50
    assert ratio.median == pytest.approx(mesh.median / alone.median)


def test_the_interval_of_a_median_holds_it_and_narrows_with_samples() -> None:
    few, many = [1.0, 1.1, 0.9, 1.2], [1.0, 1.1, 0.9, 1.2] * 50
    assert bootstrap([1.0] * 4) == (1.0, 1.0)
    (low, high), (lower, higher) = bootstrap(few), bootstrap(many)
    assert low <= 1.05 <= high
    assert higher - lower < high - low
    assert Figure.median_with_interval("x", few, "x") == Figure("x", "x", pytest.approx(1.05), low, high, 4)


def test_a_bench_that_builds_and_loads_models_prints_its_figures_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.bench.__main__ import _quieten; _quieten();"
        "from tests.support.tiny_models import build_stable_diffusion; import diffusers;"
        "build_stable_diffusion(Path(sys.argv[1])); diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
