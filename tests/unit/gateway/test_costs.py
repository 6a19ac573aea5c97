"""What the gateway takes waiting work to cost, and how much of it there is."""

from dataclasses import replace

import pytest

from imagemesh_gateway.costs import Costs, amount
from imagemesh_gateway.ledger import Ledger
from imagemesh_gateway.modes import HiresPlan, ImagePlan
from imagemesh_gateway.plan import Plan
from imagemesh_runtime.metrics import Metrics

PLAN = Plan(
    id="", model="m", prompt="", negative_prompt="", width=1000, height=500, steps=20, guidance_scale=1.0, scheduler="",
    own_scheduler="", clip_skip=0, seeds=(1,), controls=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 10.0),
        ({"guidance_scale": 7.0}, 20.0),
        ({"seeds": (1, 2, 3)}, 30.0),
        ({"image": ImagePlan(None, 0.5, None, False, 0.0, True)}, 5.0),  # type: ignore[arg-type]
        ({"hires": HiresPlan(2000, 1000, "x", 10, 0.5, "")}, 10.0 + 2.0 * 5),
    ],
)
def test_the_amount_is_megapixels_times_rows_times_evaluations(changes: dict[str, object], expected: float) -> None:
    assert amount(replace(PLAN, **changes)) == pytest.approx(expected)  # type: ignore[arg-type]


def test_nothing_is_made_up_before_anything_was_measured() -> None:
    costs = Costs()
    costs.note("m", 10.0, 0.0)
    assert costs.seconds([("m", 10.0)]) == 0


def test_what_waits_costs_as_what_was_made_and_an_unknown_model_as_the_others() -> None:
    costs = Costs()
    for seconds in (1.0, 2.0, 100.0):  # one of them was slow
        costs.note("a", 10.0, seconds)
    costs.note("b", 10.0, 4.0)
    assert costs.seconds([("a", 5.0), ("b", 5.0)]) == pytest.approx(1.0 + 2.0)
    assert costs.seconds([("never ran", 10.0)]) == pytest.approx(3.0)


def test_of_a_generation_that_moved_nothing_is_said_to_be_known() -> None:
    ledger = Ledger(Metrics("gateway"))
    for stage, seconds in (("diffusion", 3.0), ("diffusion-hires", 4.0), ("vae", 1.0)):
        ledger.hop(stage).device_seconds = seconds
    assert ledger.device_seconds("diffusion") == 7.0
    ledger.hops["diffusion-hires"].moved = True
    assert ledger.device_seconds("diffusion") == 0.0
