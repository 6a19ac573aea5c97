"""Where the knee lies is told from batches that ran, and forgotten in time."""

import asyncio
from collections.abc import Hashable, Sequence

import numpy as np
import pytest

from imagemesh_runtime.batching import Batcher, submit_rows
from imagemesh_runtime.context import current_call
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.throughput import Throughput


def measured(seconds, *counts: int, each: int = 8) -> Throughput:
    throughput = Throughput()
    for _ in range(each):
        for rows in counts:
            throughput.note("k", rows, seconds(rows))
    return throughput


@pytest.mark.parametrize(
    ("seconds", "knee"),
    [
        (lambda rows: 1.0 + rows * 0.001, None),  # every row more pays
        (lambda rows: max(rows, 4) * 1.0, 4),  # four at a time cost what one does
        (lambda rows: rows * 1.0, 1),  # batching brings nothing
        (lambda rows: rows * (1.0 if rows < 8 else 2.0), 1),  # and here less than nothing
    ],
)
def test_the_knee_is_the_fewest_rows_of_nearly_the_best_throughput(seconds, knee):
    assert measured(seconds, 1, 2, 4, 8).knee("k") == knee


def test_nothing_is_known_before_enough_batches():
    assert Throughput().knee("k") is None
    assert measured(lambda rows: rows * 1.0, 1, 2, each=7).knee("k") is None
    assert measured(lambda rows: rows * 1.0, 1, 2, each=8).knee("k") == 1


def test_of_a_kind_nothing_is_told_about_another():
    assert measured(lambda rows: rows * 1.0, 1, 2).knee("other") is None


def test_a_batch_that_took_ten_times_as_long_now_and_then_changes_nothing():
    throughput = Throughput()
    for i in range(16):
        for rows in (1, 2, 4, 8):
            throughput.note("k", rows, max(rows, 4) * (10.0 if i % 5 == 0 else 1.0))
    assert throughput.knee("k") == 4


def test_what_has_not_come_again_is_forgotten_so_that_more_is_tried():
    throughput = measured(lambda rows: rows * 1.0, 2, 4)
    assert throughput.knee("k") == 2
    for _ in range(520):
        throughput.note("k", 2, 2.0)
    assert throughput.knee("k") is None


def test_few_kinds_are_remembered():
    throughput = measured(lambda rows: rows * 1.0, 1, 2)
    for other in range(64):
        throughput.note(other, 1, 1.0)
    assert throughput.knee("k") is None
    assert len(throughput._kinds) == 64


async def test_no_batch_is_larger_than_the_measured_knee() -> None:
    sizes: list[int] = []

    async def compute(key: Hashable, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        sizes.append(sum(len(item) for item in items))
        return list(items)

    throughput = Throughput()
    for rows in (1, 2, 4):
        for _ in range(8):
            throughput.note("known", rows, max(rows, 2) * 1.0)
    batcher: Batcher[np.ndarray, np.ndarray] = Batcher(
        compute, Metrics("test"), max_rows=4, max_queue=9, throughput=throughput
    )
    await submit_rows(batcher, "known", np.arange(5))
    await asyncio.gather(*(submit_rows(batcher, "known", np.arange(1)) for _ in range(4)))
    assert sizes == [2, 2, 1, 2, 2]
    await submit_rows(batcher, "other", np.arange(5))
    assert sizes[5:] == [4, 1]


async def test_every_batch_that_succeeds_is_measured_by_what_it_computed_and_not_what_it_waited() -> None:
    throughput = Throughput()
    noted: list[tuple[Hashable, int, float]] = []
    throughput.note = lambda *batch: noted.append(batch)  # type: ignore[method-assign]

    async def compute(key: Hashable, items: Sequence[int]) -> list[int]:
        current_call().queue_seconds += 2.0
        current_call().compute_seconds += 0.25
        return [26 // (13 - item) for item in items]

    batcher: Batcher[int, int] = Batcher(compute, Metrics("test"), max_rows=4, max_queue=5, throughput=throughput)
    await batcher.submit("k", 1, 3)
    with pytest.raises(ArithmeticError):
        await batcher.submit("k", 13)
    assert noted == [("k", 3, 0.25)]
