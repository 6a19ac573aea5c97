"""Eight requests of one size and mixed settings: together over one after another, and over what the model allows."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter

from imagemesh_services.diffusion.pace import fit
from tests.bench.engines import MIXED, EngineArm, load, request
from tests.bench.harness import Figure, interleave, ratios

ROWS = (1, 2, 4, 8, 16)


def measure(root: Path, name: str, side: int, rounds: int, share: float = 1.0) -> list[Figure]:
    """``share``: of the requests' steps, for a quick run.

    The model's forwards are timed in the same rounds as both arms, so that all see the same machine.

    With a * rows + t seconds a forward, one after another takes e * (r * a + t) for each request of r rows and e
    evaluations, and no batching can take less than e * r * a: what that allows is the ratio of the sums. For requests
    of a single row it is (a + t) / a.
    """
    model = load(root, name)
    width = model.trial(side, side).conditioning["prompt_embeds"].shape[-1]
    asked = [request(width, side, max(int(share * steps), 1), guidance, scheduler, 1 + i)
             for i, (scheduler, steps, guidance) in enumerate(MIXED)]  # fmt: skip
    ticks: list[tuple[int, float]] = []

    def forwards() -> None:
        runs = [model.start(model.trial(side, side)) for _ in range(max(ROWS))]
        for _ in range(3):
            for rows in ROWS:
                begun = perf_counter()
                model.advance(runs[:rows], [None] * rows)
                ticks.append((rows, perf_counter() - begun))

    with EngineArm(model) as arm:
        done = [arm.one_after_another([inputs]) for inputs in asked]
        occupancy: list[float] = []

        def together() -> None:
            arm.requests.clear()
            arm.at_once(asked)
            occupancy.append(mean(arm.requests))

        arms = {"alone": lambda: arm.one_after_another(asked), "together": together, "forwards": forwards}
        seconds = interleave(arms, rounds)
    work = [(count, inputs.rows) for count, inputs in zip(done, asked, strict=True)]
    return _figures(f"batching at {side}x{side}", ticks, work, ratios(seconds, "alone", "together"), occupancy[1:])


def _figures(
    what: str,
    ticks: Sequence[tuple[int, float]],
    work: Sequence[tuple[int, int]],
    gains: Sequence[float],
    occupancy: Sequence[float],
) -> list[Figure]:
    """``ticks`` are (rows, seconds) of forwards, ``work`` the requests' evaluations and rows."""
    a, t = fit(ticks)
    allowed = sum(e * (r * a + t) for e, r in work) / sum(e * r * a for e, r in work)
    return [
        Figure.of(f"{what}: a, a row", [a * 1e3], "ms"),
        Figure.of(f"{what}: (a + t) / a", [(a + t) / a], "x"),
        Figure.of(f"{what}: 8 mixed requests, together / in turn", gains, "x"),
        Figure.of(f"{what}: what a and t allow for their rows", [allowed], "x"),
        Figure.of(f"{what}: share of that", [gain / allowed for gain in gains], "", ">= 0.85"),
        Figure.of(f"{what}: requests in a forward, mean", occupancy, "", ">= 3"),
    ]
