"""What the choice of a replica is worth, in simulated time."""

import random
from statistics import median

import pytest

from tests.support import routing


@pytest.mark.parametrize("load", [0.5, 0.8])
async def test_one_of_a_hundred_waits_much_less_than_with_fewest_connections_and_nothing_is_done_later(
    load: float,
) -> None:
    rate = load * sum(routing.SPEEDS) / sum(size * share for size, share in routing.SIZES)
    quicker, later = [], []
    for seed in range(5):
        random.seed(seed)
        asked = routing.requests(3000, rate, seed)
        with routing.gateway() as choose:
            ours = routing.run(asked, choose)
        theirs = routing.run(asked, routing.fewest_connections)
        quicker.append(theirs.p99 / ours.p99)
        later.append(ours.makespan / max(routing.optimum(asked), asked[-1][0]))
    assert median(quicker) >= 1.6
    assert median(later) <= 1.05
