"""The benchmarks run and write what they say; nothing here depends on how long anything takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import alone, backends, batching, declared, hops
from tests.bench.harness import HEADER, Figure, interleave, interleave_costs, ratios
from tests.support.sizes import ROOT

HOPS = ("a prompt (0.6 kB)", "latents of 512x512 (0.85 MB)", "latents of 8 x 1024x1024 (27 MB)")


def test_arms_warm_up_and_then_take_turns_in_alternating_order() -> None:
    ran: list[str] = []
    seconds = interleave({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, rounds=3)
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 3, "b": 3}
    assert all(sample >= 0 for samples in seconds.values() for sample in samples)


def test_no_round_begins_when_the_time_is_over_and_one_always_does() -> None:
    ran: list[str] = []
    seconds = interleave({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 1000, 0.0, warm=True)
    assert "".join(ran) == "ab"
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 1, "b": 1}


def test_costs_are_of_the_wall_and_of_the_processes_that_are_counted() -> None:
    spent = iter(range(100))
    costs = interleave_costs({"a": lambda: None}, rounds=2, cpu=lambda: float(next(spent)))
    assert [cost.cpu for cost in costs["a"]] == [1.0, 1.0]


def test_ratios_compare_round_by_round() -> None:
    assert ratios({"mesh": [2.0, 9.0], "alone": [1.0, 3.0]}, "mesh", "alone") == [2.0, 3.0]


def test_a_figure_is_the_median_with_its_quartiles() -> None:
    figure = Figure.of("latency", [5.0, 1.0, 3.0, 2.0, 4.0], "s", "<= 3")
    assert (figure.low, figure.median, figure.high, figure.samples) == (1.5, 3.0, 4.5, 5)
    assert Figure.of("one", [7.0], "s") == Figure("one", "s", 7.0, 7.0, 7.0, 1)
    assert figure.row().split() == ["latency", "3.000", "s", "1.500", "..", "4.500", "5", "<=", "3"]
    assert HEADER.index("n  target") == figure.row().index("5  <= 3")


def test_the_payloads_are_as_large_as_they_are_called() -> None:
    from imagemesh_services.vae.backend import MemoryOptions
    from imagemesh_services.vae.backends.fake import FakeVaeModel

    for latents, megabytes in ((hops.SMALL, 0.85), (hops.LARGE, 27)):
        pictures = FakeVaeModel().decode(latents, MemoryOptions())
        assert (latents.nbytes + pictures.nbytes) / 1e6 == pytest.approx(megabytes, rel=0.02)


def test_one_round_of_the_hops_is_measured_printed_and_written(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "tests.bench", "--rounds", "1", "--out", str(out), "hops"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    names = [figure["name"] for figure in written["figures"]]
    wanted = [f"hop: {what}, {kind}" for what in HOPS for kind in ("wall", "CPU of both ends")]
    assert names == [*wanted, "hop: of the 27 MB the fake's own decoding"]
    assert all(figure["samples"] == 1 and figure["median"] >= 0 for figure in written["figures"])
    assert all(name in done.stdout for name in names)
    assert written["machine"]["cores"] == os.cpu_count()


def test_requests_of_mixed_settings_are_measured_together_in_turn_and_against_what_the_model_allows(
    models: Path,
) -> None:
    figures = {figure.name.split(": ")[1]: figure for figure in batching.measure(models, "tiny-sd", 64, 1, share=0.2)}
    gain, allowed = figures["8 mixed requests, together / in turn"], figures["what a and t allow for their rows"]
    assert figures["share of that"].median == pytest.approx(gain.median / allowed.median)
    assert allowed.median >= 1
    assert 1 <= figures["requests in a forward, mean"].median <= 8


def test_a_lone_request_is_measured_against_diffusers_whole_and_step_by_step(models: Path) -> None:
    figures = alone.measure(models, "tiny-sd", 64, rounds=1)
    assert [figure.samples for figure in figures] == [1, 1, alone.STEPS - 1, alone.STEPS - 1]
    assert all(figure.median > 0 for figure in figures)


def test_every_backend_is_measured_against_torch_module_by_module(models: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-sd").symlink_to(models / "tiny-sd")
    figures = backends.measure(tmp_path / "models", "tiny-sd", 64, 2)
    assert [figure.name for figure in figures] == [
        f"{work}: {what}"
        for work in backends.WORK.values()
        for what in ("torch", "onnxruntime over torch", "openvino over torch")
    ]
    assert all(figure.samples == 2 and figure.median > 0 for figure in figures)


def test_the_engines_wait_is_measured_against_whole_requests() -> None:
    engine, whole, shorter = declared.wait(rounds=1, requests=12, seconds=0.01)
    assert shorter.median == pytest.approx(whole.median / engine.median)
    assert engine.median > 0


def test_an_engines_throughput_is_measured_against_the_declared_devices_capacity() -> None:
    rows, share = declared.capacity(rounds=1, requests=12, a=0.001, t=0.001)
    assert 4 <= rows.median <= 12
    assert 0 < share.median < 1
