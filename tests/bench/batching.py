"""Eight requests of one size and mixed settings: together over one after another, and over what the model allows."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter

from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.pace import fit
from tests.bench.engines import MIXED, EngineArm, load, request
from tests.bench.harness import Figure, interleave, ratios

ROWS = (1, 2, 4, 8, 16)
# All rounds of a size are to take about so long: where the machine is slow, or busy, the requests have fewer steps.
SECONDS = 60.0
LEAST_SHARE = 0.2
# Of a round's seconds over those that its requests take in turn: they together, and the model's forwards.
WHOLE = 2.2


def measure(root: Path, name: str, side: int, rounds: int, share: float = 0.5) -> list[Figure]:
    """``share``: of the requests' steps, at most.

    The model's forwards are timed in the same rounds as both arms, so that all see the same machine.

    With a * rows + t seconds a forward, one after another takes e * (r * a + t) for each request of r rows and e
    evaluations, and no batching can take less than e * r * a: what that allows is the ratio of the sums. For requests
    of a single row it is (a + t) / a.
    """
    model = load(root, name)
    width = model.trial(side, side).conditioning["prompt_embeds"].shape[-1]
    ticks: list[tuple[int, float]] = []

    def forwards() -> None:
        runs = [model.start(model.trial(side, side)) for _ in range(max(ROWS))]
        for _ in range(3):
            for rows in ROWS:
                begun = perf_counter()
                model.advance(runs[:rows], [None] * rows)
                ticks.append((rows, perf_counter() - begun))

    with EngineArm(model) as arm:
        occupancy: list[float] = []

        def together() -> None:
            arm.requests.clear()
            arm.at_once(asked)
            occupancy.append(mean(arm.requests))

        arm.at_once(_requests(width, side, LEAST_SHARE))  # warm up
        begun = perf_counter()
        arm.one_after_another(_requests(width, side, LEAST_SHARE))
        whole = WHOLE * (perf_counter() - begun) / LEAST_SHARE
        asked = _requests(width, side, min(share, max(SECONDS / rounds / whole, LEAST_SHARE)))
        arms = {"alone": lambda: arm.one_after_another(asked), "together": together, "forwards": forwards}
        seconds = interleave(arms, rounds, SECONDS, warm=True)
    work = [(model.start(inputs).evaluations, inputs.rows) for inputs in asked]
    return _figures(f"batching at {side}x{side}", ticks, work, ratios(seconds, "alone", "together"), occupancy)


def _requests(width: int, side: int, share: float) -> list[SampleInputs]:
    return [
        request(width, side, max(int(share * steps), 1), guidance, scheduler, 1 + i)
        for i, (scheduler, steps, guidance) in enumerate(MIXED)
    ]


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
