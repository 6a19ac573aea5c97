"""The benchmarks of ControlNets run on what is small; nothing here depends on how long anything takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import against_triton, declared_control, overlap, several, stall, transport
from tests.bench.owners import owner
from tests.support import triton
from tests.support.sizes import ROOT


def test_residuals_are_as_large_as_they_are_called() -> None:
    for shapes, megabytes in zip(transport.SHAPES.values(), (26.9, 107.5), strict=True):
        total = sum(transport.ROWS * channels * side * side * 2 for channels, side in shapes)
        assert total / 1e6 == pytest.approx(megabytes, rel=0.005)


def test_residuals_are_handed_over_in_every_way_and_compared() -> None:
    """The smallest of them, twice; that each way carried its bytes the measure itself checks."""
    figures = transport.measure(rounds=2, last=3)
    assert len(figures) == 2 * len(transport.SHAPES) * (len(transport.WAYS) + 1 + 4)
    assert all(figure.samples == 2 and figure.median > 0 for figure in figures)
    assert [figure.target for figure in figures if "SDXL" in figure.name and figure.target][:3] == [
        ">= 15",
        "<= 2.5",
        ">= 4",
    ]


def test_the_declared_forward_is_spread_over_all_residuals_and_longer_than_the_wire() -> None:
    assert declared_control.SLOWER > 1
    for name, shapes in transport.SHAPES.items():
        assert sum(many for many, _ in declared_control.PARTS[name]) == len(shapes)
        assert sum(share for _, share in declared_control.PARTS[name]) == pytest.approx(1, abs=0.011)


def test_the_samplers_stall_is_measured_for_residuals_sent_afterwards_and_block_by_block() -> None:
    """The smallest of them in full size."""
    figures = stall.measure(rounds=2, last=3)
    assert len(figures) == len(stall.TARGETS) * 5
    assert all(figure.median > 0 for figure in figures)
    assert [figure.target for figure in figures if figure.target] == [">= 10", ">= 8"]


def test_the_bytes_of_several_controlnets_are_counted_both_ways() -> None:
    """With the smallest residuals and few steps the pictures weigh, and three are seen to be more than one."""
    figures = several.measure(steps=2, last=3)
    assert [figure.target for figure in figures] == ["", "", "<= 1.02"] * 2
    for one, three, ratio in (figures[:3], figures[3:]):
        assert ratio.median == pytest.approx(three.median / one.median)
        assert 1 < ratio.median < 2


def test_a_controlled_generation_on_two_cores_is_measured_against_the_library_on_one() -> None:
    figures = overlap.measure(rounds=1, widths=(32, 32, 64, 64), side=64, steps=2)
    assert [figure.target for figure in figures] == ["", "", "", ">= 1.3", ">= 1.2"]
    assert all(figure.median > 0 for figure in figures)


def test_a_bench_whose_other_process_does_not_start_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"tests\.bench\.harness did not start"), owner("", "tests.bench.harness"):
        pass


def test_what_a_bench_starts_ends_with_it_even_if_it_is_killed() -> None:
    """Its standard output is held by both, and so at its end when neither is left."""
    code = (
        "import os, subprocess, sys; bound = [sys.executable, '-m', 'tests.support.bound', str(os.getpid())];"
        "child = subprocess.Popen([*bound, 'http.server', '--bind', '127.0.0.1', '0'], start_new_session=True);"
        "child.wait()"
    )
    command = [sys.executable, "-u", "-c", code]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline().startswith(b"Serving HTTP")
        starter.kill()
        starter.communicate(timeout=30)


def test_where_no_triton_is_the_bench_against_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(triton, "ENVIRONMENT", tmp_path)
    with pytest.raises(triton.NoTriton, match="`make triton` makes it"):
        against_triton.measure(rounds=1)


def test_a_triton_model_is_told_of_every_residual(tmp_path: Path) -> None:
    against_triton.write_model(tmp_path, "SDXL 1024x1024")
    config = (tmp_path / "SDXL-1024x1024" / "config.pbtxt").read_text()
    dims = re.findall(r'"residual_\d+" data_type: TYPE_FP16 dims: \[ (\d+), (\d+), (\d+), (\d+) \]', config)
    assert [tuple(map(int, one)) for one in dims] == [
        (transport.ROWS, channels, side, side) for channels, side in transport.SHAPES["SDXL 1024x1024"]
    ]
