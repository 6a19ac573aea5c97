"""``imagemesh serve diffusion`` with samplers that keep a record, and that one request takes down with it.

    python -m tests.support.tampered serve diffusion --set backend=recorded-torch

"recorded-torch" and "recorded-fake" are the backends of those names. Each evaluation is a line in the file that
``RECORD_VARIABLE`` names: the process, the request's first seed, the evaluation. The line is written when the
evaluation is done, so that it outlives a process that is killed. A request of seed ``DEADLY`` ends the process at its
third evaluation. The process whose number stands in the file of that name and ``.hang`` hangs in its forwards until the
file is gone. The fake one takes its time, so that there is something to interrupt.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imagemesh_runtime.registry import BackendEntry
from imagemesh_services.diffusion.backend import BACKENDS, Residuals, Run

RECORD_VARIABLE = "IMAGEMESH_TEST_RECORD"
DEADLY = 666
EXIT_CODE = 66
FAKE_SECONDS = 0.01


class Record:
    """What the samplers of all processes did, from one ``read`` to the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hang = path.with_suffix(".hang")
        self._read = 0

    def read(self) -> "list[tuple[int, int, int]]":
        """(process, seed, evaluation) of every evaluation since the last call."""
        with self.path.open() as file:
            file.seek(self._read)
            lines = file.read().splitlines()
            self._read = file.tell()
        return [(int(process), int(seed), int(evaluation)) for process, seed, evaluation in map(str.split, lines)]

    def at_work(self, process: int) -> "Callable[[], bool]":
        """What tells whether that process has done an evaluation since now; ``read`` still has it."""
        since = self.path.stat().st_size

        def told() -> bool:
            with self.path.open() as file:
                file.seek(since)
                return any(line.startswith(f"{process} ") for line in file)

        return told


def repeated(done: "Sequence[tuple[int, int, int]]") -> "dict[int, int]":
    """How many evaluations were done more than once, by seed."""
    times = Counter((seed, evaluation) for _, seed, evaluation in done)
    found: Counter[int] = Counter()
    for (seed, _), count in times.items():
        found[seed] += count - 1
    return dict(found)


def _recording(model: Any, seed_of: Any, done: Any, seconds: float) -> Any:
    """The model, telling of each evaluation."""
    advance = model.advance
    hung = Record(Path(os.environ[RECORD_VARIABLE])).hang
    file = os.open(os.environ[RECORD_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def recorded(runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Any:
        if any(seed_of(run) == DEADLY and done(run) == 2 for run in runs):
            os._exit(EXIT_CODE)
        while hung.exists() and hung.read_text() == str(os.getpid()):
            time.sleep(0.05)
        time.sleep(seconds)
        faults = advance(runs, residuals)
        lines = [f"{os.getpid()} {seed_of(run)} {done(run)}\n" for run in runs]
        os.write(file, "".join(lines).encode())
        return faults

    model.advance = recorded
    return model


def recorded_torch(config: Any) -> Any:
    """The backend in torch, recorded."""
    from imagemesh_services.diffusion.backends.torch import TorchDiffusion

    backend = TorchDiffusion(config)
    load = backend.load
    backend.load = lambda name: _recording(load(name), _torch_seed, lambda run: run._done, 0.0)  # type: ignore[method-assign]
    return backend


def _torch_seed(run: Any) -> int:
    seed: int = run._generators()[0].initial_seed()
    return seed


def recorded_fake(config: Any) -> Any:
    """The fake backend, recorded, and slow."""
    from imagemesh_services.diffusion.backends.fake import FakeDiffusion

    backend = FakeDiffusion(config)
    load = backend.load
    backend.load = lambda name: _recording(  # type: ignore[method-assign]
        load(name), lambda run: run._inputs.seeds[0], lambda run: run._done, FAKE_SECONDS
    )
    return backend


def main() -> int:
    """The command, with these backends in the table."""
    table: Any = BACKENDS
    for name in ("torch", "fake"):
        table[f"recorded-{name}"] = BackendEntry(f"tests.support.tampered:recorded_{name}", explicit=True)
    from imagemesh_cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
