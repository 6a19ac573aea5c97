"""Seconds of work, predicted from ticks that were measured."""

from collections.abc import Sequence

import numpy as np
import pytest

from imagemesh_services.diffusion.forecast import finish_times
from imagemesh_services.diffusion.limits import Limit, Limits
from imagemesh_services.diffusion.pace import Pace, Work, fit, knee


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


def limited(max_rows: int) -> Limits:
    return Limits(max_rows, Pace())


def test_generations_that_share_forwards_pay_the_tick_once() -> None:
    times = finish_times([Work("k", 2, 10), Work("k", 2, 20)], [], limited(16), paced())
    both, one = 0.01 * 4 + 0.05, 0.01 * 2 + 0.05
    assert times == pytest.approx([10 * both, 10 * both + 10 * one])


def test_who_waits_enters_when_rows_are_free() -> None:
    times = finish_times([Work("k", 8, 10)], [Work("k", 8, 10), Work("k", 4, 5)], limited(8), paced())
    full, half = 0.01 * 8 + 0.05, 0.01 * 4 + 0.05
    assert times == pytest.approx([10 * full, 20 * full, 20 * full + 5 * half])


def test_a_generation_larger_than_the_batch_runs_alone() -> None:
    assert finish_times([], [Work("k", 32, 2)], limited(8), paced()) == pytest.approx([2 * (0.32 + 0.05)])


def test_kinds_take_turns() -> None:
    pace = paced()
    pace.note("big", 1, 1.0)
    times = finish_times([Work("k", 1, 3), Work("big", 1, 3)], [], limited(16), pace)
    assert times == pytest.approx([3 * 1.06, 3 * 1.06])


def test_a_long_queue_is_forecast_by_a_few_steps_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, asked = paced(), 0
    seconds = pace.tick_seconds

    def counted(kind: str, rows: int, forwards: int = 1) -> float | None:
        nonlocal asked
        asked += 1
        return seconds(kind, rows, forwards)

    monkeypatch.setattr(pace, "tick_seconds", counted)
    times = finish_times([], [Work("k", 1, 10 + i % 7) for i in range(500)], limited(16), pace)
    assert times is not None
    full = sum(10 + i % 7 for i in range(500)) / 16 * (0.16 + 0.05)
    assert full <= max(times) <= 1.05 * full  # only at the end is there room that nobody takes
    assert asked <= 500


def test_what_was_never_measured_is_not_guessed() -> None:
    assert finish_times([Work("new", 1, 3)], [], limited(16), paced()) is None
    assert finish_times([], [], limited(16), Pace()) == []


def test_evaluations_a_step_are_learned() -> None:
    pace = Pace()
    assert pace.evaluations("Heun", 10) == 10
    pace.note_evaluations("Heun", 20, 39)
    assert pace.evaluations("Heun", 10) == 20


def test_at_the_knee_throughput_is_within_three_percent_of_all_there_is() -> None:
    for a, t in ((0.06, 0.03), (0.01, 0.01), (1.0, 0.0)):
        rows = knee(a, t)
        assert rows is not None
        assert rows / (a * rows + t) >= 1 / a / 1.03 - 1e-9
        assert rows == 1 or (rows - 1) / (a * (rows - 1) + t) < 1 / a / 1.03
    assert knee(0.0, 0.1) is None


def ticked(rows: Sequence[int], times: int, a: float = 0.01, t: float = 0.002) -> Pace:
    pace = Pace()
    for count in rows:
        for _ in range(times):
            pace.note("k", count, a * count + t)
    return pace


def test_ticks_of_two_sizes_tell_the_knee() -> None:
    assert ticked([1, 2, 4], 8).knee("k") == knee(0.01, 0.002) == 7
    assert ticked([4], 64).knee("k") is None
    assert ticked([4, 6], 8).knee("k") is None  # too near each other
    assert ticked([1, 4], 7).knee("k") is None
    assert Pace().knee("k") is None


def test_a_knee_is_forgotten_when_what_it_was_told_from_is_old() -> None:
    pace = ticked([1, 4], 8)
    for _ in range(1100):
        pace.note("k", 1, 0.012)
    assert pace.knee("k") is None


def test_the_kinds_that_are_remembered_are_bounded() -> None:
    pace = Pace()
    for i in range(1000):
        pace.note(i, 1, 0.1)
    assert len(pace.kinds()) == 256
    assert pace.tick_seconds(0, 1) is None
    assert pace.tick_seconds(999, 1) == pytest.approx(0.1)


def test_what_is_on_file_goes_before_what_ticks_tell_and_both_before_the_bound() -> None:
    limits = Limits(16, ticked([1, 2, 4], 8), {"tuned": 5, "k": 3, "large": 40})
    assert limits.of("tuned") == Limit(5, "tune")
    assert limits.of("k") == Limit(3, "tune")
    assert Limits(16, ticked([1, 2, 4], 8)).of("k") == Limit(7, "ticks")
    assert limits.of("large") == Limit(16, "max_batch")
    assert limits.of("unknown") == Limit(16, "max_batch")
    assert limits.kinds() == ["tuned", "k", "large"]


def test_a_limit_is_its_kinds_and_the_bound_is_all_kinds_together() -> None:
    fits = Limits(8, Pace(), {"k": 4}).fits
    assert fits([Work("k", 2, 1)], Work("k", 2, 1))
    assert not fits([Work("k", 2, 1)], Work("k", 3, 1))
    assert fits([Work("other", 2, 1)], Work("k", 6, 1))  # more than the limit, but by itself among its kind
    assert not fits([Work("other", 3, 1)], Work("k", 6, 1))
    assert fits([], Work("k", 99, 1))


def test_forwards_that_are_not_shared_are_told_apart_from_rows() -> None:
    pace = Pace()
    for rows, forwards in ((1, 1), (4, 2), (8, 2), (2, 1)):
        pace.note("k", rows, 0.01 * rows + 0.05 * forwards, forwards)
    assert pace.tick_seconds("k", 6, 3) == pytest.approx(0.06 + 0.15)
    assert finish_times([Work("k", 3, 10, own=1)], [], limited(16), pace) == pytest.approx([10 * (0.03 + 0.1)])


def test_rows_that_guidance_no_longer_needs_are_free_for_others() -> None:
    guided = Work("k", 8, 10, then=Work("k", 4, 10))
    times = finish_times([guided], [Work("k", 4, 5)], limited(8), paced())
    full, half = 0.01 * 8 + 0.05, 0.01 * 4 + 0.05
    assert times == pytest.approx([10 * full + 5 * full + 5 * half, 10 * full + 5 * full])
