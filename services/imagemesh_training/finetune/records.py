"""What a run tells while it goes on: a line of JSON for each report, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

METRICS: Final = "metrics.jsonl"
BOARD: Final = "tensorboard"


class Records:
    """Appends to ``metrics.jsonl`` and, where the package tensorboard is here, to its event files.

    Args:
        step, epochs: how far the run is that goes on; what was told of later steps is taken back.

    Attributes:
        board: whether TensorBoard is told.
    """

    def __init__(self, room: Path, step: int, epochs: int) -> None:
        path = room / METRICS
        _take_back(path, step, epochs)
        self._file = path.open("a")
        self._board = _board(room / BOARD, step)
        self.board = self._board is not None

    def tell(self, step: int, epoch: int, **values: float) -> None:
        """Report values at a step."""
        self._file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name.replace("_", "/", 1), value, step)
            self._board.flush()

    def close(self) -> None:
        """Nothing more is told."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _take_back(path: Path, step: int, epochs: int) -> None:
    """Keep what was told up to that step; a kill may have left half a line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if told["step"] <= step and ("accuracy" not in told or told["epoch"] <= epochs):
            kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    os.replace(part, path)


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
