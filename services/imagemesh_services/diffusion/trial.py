"""What a diffusion model is measured by: one evaluation with guidance, which is two rows."""

from collections.abc import Callable

from imagemesh_services.diffusion.backend import DiffusionModel, Run


def trial(model: DiffusionModel, width: int, height: int) -> Callable[[], object]:
    """The work, of a picture of that size in pixels."""
    inputs = model.trial(width, height)
    runs: list[Run] = []
    done = 0

    def evaluate() -> None:
        nonlocal done
        if not runs or done == runs[0].evaluations:
            runs[:] = [model.start(inputs) for _ in range(2)]
            done = 0
        for fault in model.advance(runs, [None] * len(runs)):
            if fault is not None:
                raise fault
        done += 1

    return evaluate
