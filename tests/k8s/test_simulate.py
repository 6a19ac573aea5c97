"""The autoscaler's arithmetic by hand-worked cases, and what the simulation does with it."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.autoscaling import Autoscaler, Policy, simulate
from deploy.simulate import rush
from tests.support.manifests import K8S, find, render
from tests.support.sizes import ROOT

POLICY = Policy(target=30, most=10)


def test_it_wants_as_many_as_the_sum_has_targets() -> None:
    free = replace(POLICY, up_pods=10)
    assert Autoscaler(free).step(0, 91, 1) == 4  # ceil(91 / 30)
    assert Autoscaler(free).step(0, 10_000, 1) == 10  # at most


@pytest.mark.parametrize(("metric", "wanted"), [(54, 2), (60, 2), (65, 2), (67, 3)])
def test_within_a_tenth_nothing_changes(metric: float, wanted: int) -> None:
    assert Autoscaler(POLICY).step(0, metric, 2) == wanted


def test_it_goes_up_by_two_a_minute() -> None:
    scaler, replicas, seen = Autoscaler(POLICY), 1, []
    for now in range(0, 121, 15):
        replicas = scaler.step(now, 900, replicas)
        seen.append(replicas)
    assert seen == [3, 3, 3, 3, 5, 5, 5, 5, 7]


def test_it_goes_down_after_the_window_alone_and_by_one_in_two_minutes() -> None:
    scaler, replicas = Autoscaler(POLICY), 4
    assert scaler.step(0, 120, replicas) == 4
    seen = {}
    for now in range(15, 1000, 15):
        fewer = scaler.step(now, 0, replicas)
        if fewer != replicas:
            seen[now] = replicas = fewer
    assert seen == {615: 3, 735: 2, 855: 1}


def test_no_request_is_lost_and_none_is_quicker_than_its_work() -> None:
    arrivals = rush(6)
    run = simulate(arrivals, 6, 60, POLICY)
    assert len(run.times) == len(arrivals)
    assert min(run.times) >= 6 - 1  # moments are a second long
    assert run.moments[-1].replicas == POLICY.least
    assert max(moment.replicas for moment in run.moments) <= POLICY.most


def test_what_waits_in_the_gateways_store_counts() -> None:
    at_once = [0.0] * 200  # of which a replica is handed 8, or 16 s of work: less than the target
    run = simulate(at_once, 2, 60, POLICY)
    assert len(run.times) == len(at_once)
    assert max(moment.replicas for moment in run.moments) > 1
    assert run.moments[0].backlog == pytest.approx(400 - 1)


def test_one_replica_that_keeps_up_answers_at_once() -> None:
    run = simulate([0.0, 100.0, 200.0], 10, 60, POLICY)
    assert run.quantile(1) <= 11
    assert {moment.replicas for moment in run.moments} == {1}


def test_the_manifests_have_the_settings_that_are_simulated() -> None:
    policy = Policy()
    (hpa,) = [
        one
        for one in find(render(K8S / "tests" / "hpa-mixed"), "HorizontalPodAutoscaler")
        if one["metadata"]["name"] == "diffusion"
    ]
    up, down = hpa["spec"]["behavior"]["scaleUp"], hpa["spec"]["behavior"]["scaleDown"]
    assert hpa["spec"]["metrics"][0]["external"]["target"] == {
        "type": "AverageValue",
        "averageValue": str(int(policy.target)),
    }
    assert (hpa["spec"]["minReplicas"], hpa["spec"]["maxReplicas"]) == (policy.least, policy.most)
    assert up == {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Pods", "value": policy.up_pods, "periodSeconds": policy.up_period}],
    }
    assert down == {
        "stabilizationWindowSeconds": policy.down_window,
        "policies": [{"type": "Pods", "value": policy.down_pods, "periodSeconds": policy.down_period}],
    }


def test_the_command_prints_a_line_a_target_and_draws(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("\n".join(str(second * 4) for second in range(100)))
    command = [sys.executable, "-m", "deploy.simulate", "--trace", trace, "--targets", "10", "60", "--draw", "10"]
    done = subprocess.run([*command, "--out", tmp_path / "p.svg"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "100 generations of 6.0 s; a new replica takes work after 60 s"
    assert [line.split()[0] for line in lines[2:-1]] == ["10", "60"]
    assert len(ElementTree.parse(tmp_path / "p.svg").findall(".//{*}polyline")) == 3
