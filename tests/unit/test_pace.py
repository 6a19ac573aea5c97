"""Seconds of work, predicted from ticks that were measured."""

import numpy as np
import pytest

from imagemesh_services.diffusion.pace import Pace, Work, finish_times, fit


def test_a_row_and_a_tick_are_told_apart() -> None:
    a, t = fit([(rows, 0.02 * rows + 0.1) for rows in (1, 2, 4, 8, 2, 4)])
    assert (a, t) == pytest.approx((0.02, 0.1))


def test_a_tick_that_took_ten_times_as_long_hardly_counts() -> None:
    numbers = np.random.default_rng(0)
    ticks = [(rows, (0.02 * rows + 0.1) * numbers.uniform(0.95, 1.05)) for rows in (2, 4, 8) for _ in range(9)]
    a, t = fit([*ticks, (8, 10.0), (2, 10.0)])
    assert 8 * a + t == pytest.approx(0.26, rel=0.1)


def test_neither_cost_is_negative() -> None:
    assert fit([(1, 0.3), (8, 0.2)])[0] == 0
    assert fit([(2, 0.1), (4, 0.3)]) == pytest.approx((0.0625, 0), abs=0.01)


def test_one_row_count_alone_is_the_rows() -> None:
    assert fit([(4, 0.2), (4, 0.2)]) == pytest.approx((0.05, 0))


def paced(a: float = 0.01, t: float = 0.05, kind: str = "k") -> Pace:
    pace = Pace()
    for rows in (1, 2, 4, 8):
        pace.note(kind, rows, a * rows + t)
    return pace


def test_generations_that_share_forwards_pay_the_tick_once() -> None:
    times = finish_times([Work("k", 2, 10), Work("k", 2, 20)], [], 16, paced())
    both, one = 0.01 * 4 + 0.05, 0.01 * 2 + 0.05
    assert times == pytest.approx([10 * both, 10 * both + 10 * one])


def test_who_waits_enters_when_rows_are_free() -> None:
    times = finish_times([Work("k", 8, 10)], [Work("k", 8, 10), Work("k", 4, 5)], 8, paced())
    full, half = 0.01 * 8 + 0.05, 0.01 * 4 + 0.05
    assert times == pytest.approx([10 * full, 20 * full, 20 * full + 5 * half])


def test_a_generation_larger_than_the_batch_runs_alone() -> None:
    assert finish_times([], [Work("k", 32, 2)], 8, paced()) == pytest.approx([2 * (0.32 + 0.05)])


def test_kinds_take_turns() -> None:
    pace = paced()
    pace.note("big", 1, 1.0)
    times = finish_times([Work("k", 1, 3), Work("big", 1, 3)], [], 16, pace)
    assert times == pytest.approx([3 * 1.06, 3 * 1.06])


def test_what_was_never_measured_is_not_guessed() -> None:
    assert finish_times([Work("new", 1, 3)], [], 16, paced()) is None
    assert finish_times([], [], 16, Pace()) == []


def test_evaluations_a_step_are_learned() -> None:
    pace = Pace()
    assert pace.evaluations("Heun", 10) == 10
    pace.note_evaluations("Heun", 20, 39)
    assert pace.evaluations("Heun", 10) == 20
