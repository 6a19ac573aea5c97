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
