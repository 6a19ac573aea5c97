"""An engine by itself, without a server around it, and requests for it."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import DiffusionModel, Residuals, Run, SampleInputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.engine import Engine
from imagemesh_services.diffusion.generation import Finished
from imagemesh_services.diffusion.schedulers import find_scheduler

T = TypeVar("T")

# What 8 callers ask for: scheduler, steps, guidance. Heun evaluates the model 2 * steps - 1 times.
MIXED: Sequence[tuple[str, int, float]] = (
    ("DDIM", 20, 3.0),
    ("Euler a", 18, 7.5),
    ("DPM++ 2M Karras", 22, 5.0),
    ("Heun", 10, 9.0),
    ("DPM++ SDE", 10, 6.0),
    ("PNDM", 19, 1.0),
    ("UniPC", 21, 4.0),
    ("LCM", 17, 2.0),
)


def load(root: Path, name: str, threads: int = 0) -> Any:
    """The model of that name in torch."""
    from imagemesh_services.diffusion.backends.torch import TorchDiffusion

    return TorchDiffusion(DiffusionConfig(backend="torch", models=str(root), device="cpu", threads=threads)).load(name)


def request(
    width_of_prompt: int, side: int, steps: int, guidance: float = 1.0, scheduler: str = "", seed: int = 1
) -> SampleInputs:
    """One picture of a random prompt, ``side`` pixels wide and high."""
    numbers = np.random.default_rng(seed)
    names = ("prompt_embeds", "negative_prompt_embeds")
    conditioning = {name: numbers.normal(size=(1, 77, width_of_prompt)).astype(np.float32) for name in names}
    return SampleInputs(conditioning, side, side, steps, guidance, find_scheduler(scheduler), (seed,))


class EngineArm:
    """An engine on a lane of its own; counts the requests and rows of its forwards."""

    def __init__(self, model: DiffusionModel, *, max_rows: int = 32, max_queue: int = 1024) -> None:
        self._runner = asyncio.Runner()
        self._lane = Lane("bench")
        self.model = model
        self.requests: list[int] = []
        self.engine = Engine(self._lane, Metrics("diffusion"), max_rows=max_rows, max_queue=max_queue)
        self._advance = model.advance
        model.advance = self._counted  # type: ignore[method-assign]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.model.advance = self._advance  # type: ignore[method-assign]
        self._runner.run(self.engine.close())
        self._runner.close()
        self._lane.close()

    def one_after_another(self, asked: Iterable[SampleInputs]) -> int:
        """Each when the one before is done; answers the evaluations."""

        async def all_of_them() -> int:
            return sum([await self.one(inputs) for inputs in asked])

        return self.run(all_of_them())

    def at_once(self, asked: Iterable[SampleInputs]) -> int:
        """All together; answers the evaluations."""

        async def all_of_them() -> int:
            return sum(await asyncio.gather(*(self.one(inputs) for inputs in asked)))

        return self.run(all_of_them())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it on the engine's event loop."""
        return self._runner.run(work)

    async def one(self, inputs: SampleInputs) -> int:
        """One request; answers the evaluations."""
        evaluations = 0
        async for event in self.engine.sample(self.model, inputs):
            evaluations = event.evaluations if isinstance(event, Finished) else evaluations
        return evaluations

    def _counted(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Sequence[Exception | None]:
        self.requests.append(len(runs))
        return self._advance(runs, residuals)
