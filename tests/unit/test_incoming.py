"""Residuals on their way: who waits for them, and for how long."""

import threading

import numpy as np
import pytest

from imagemesh_services.diffusion.backend import Late, Residuals
from imagemesh_services.diffusion.incoming import Incoming, Patience

WHOLE = Residuals([np.zeros(1)], np.ones(1))


def test_what_is_there_is_read_without_a_wait() -> None:
    incoming = Incoming()
    assert not incoming.there
    incoming.complete(WHOLE)
    assert incoming.there
    assert (incoming.down, incoming.mid) == (WHOLE.down, WHOLE.mid)
    assert incoming.stalled == 0


def test_without_patience_what_is_not_there_is_late() -> None:
    with pytest.raises(Late):
        _ = Incoming().mid


def test_a_reader_waits_and_is_told_how_long() -> None:
    incoming, reading = Incoming(), threading.Event()
    incoming.patience = Patience(60)

    def complete() -> None:
        assert reading.wait(30)
        incoming.complete(WHOLE)

    thread = threading.Thread(target=complete)
    thread.start()
    reading.set()
    assert incoming.mid is WHOLE.mid
    thread.join()
    assert incoming.stalled < 30


def test_a_reader_is_let_go_when_no_more_will_come() -> None:
    incoming = Incoming()

    class Interrupted(Patience):
        def left(self) -> float:
            incoming.give_up()
            return super().left()

    incoming.patience = Interrupted(60)
    with pytest.raises(Late):
        _ = incoming.down
    assert 0 < incoming.stalled < 30


def test_the_rows_of_a_forward_share_their_patience() -> None:
    left = []

    class Noting(Patience):
        def left(self) -> float:
            left.append(super().left())
            return left[-1]

    patience = Noting(0.05)
    for _ in range(3):
        incoming = Incoming()
        incoming.patience = patience
        with pytest.raises(Late):
            _ = incoming.mid
    assert 0 < left[0] <= 0.05 + 1e-9
    assert left[1:] == [0, 0]


def test_what_is_complete_stays_so() -> None:
    incoming = Incoming()
    incoming.complete(WHOLE)
    incoming.give_up()
    assert incoming.mid is WHOLE.mid


def test_those_of_several_are_added_once_in_their_order_as_the_reader_wants() -> None:
    added: list[tuple[float, float]] = []

    def plus(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        added.append((float(one[0]), float(other[0])))
        return one + other

    incoming = Incoming(plus)
    incoming.complete(*(Residuals([np.full(2, i)], np.full(2, 10.0 * i)) for i in (1, 2, 4)))
    assert incoming.there
    assert added == []
    for _ in range(2):
        np.testing.assert_array_equal(incoming.down, [[7, 7]])
        np.testing.assert_array_equal(incoming.mid, [70, 70])
    assert added == [(1, 2), (10, 20), (3, 4), (30, 40)]


def test_those_that_lack_the_rows_at_the_front_add_nothing_there() -> None:
    incoming = Incoming()
    incoming.complete(Residuals([np.ones((2, 3))], np.ones((2, 3))), Residuals([np.ones((1, 3))], np.ones((1, 3))))
    np.testing.assert_array_equal(incoming.mid, [[1, 1, 1], [2, 2, 2]])
