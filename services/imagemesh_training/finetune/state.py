"""What a run must remember to go on as if it had never stopped, in files that a kill leaves whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_training.finetune.parts import learned, restore

STATE: Final = "state.safetensors"
BESTS: Final = "best-*.safetensors"  # of each epoch that was the best one, until a state names it
RUN: Final = "run.json"


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: steps of the optimizer done.
        epochs: done, each with its validation.
        loss: sum over the steps of the epoch that is under way.
        best: (accuracy, minus the loss) of the best epoch.
        since: epochs since then.
    """

    step: int = 0
    epochs: int = 0
    loss: float = 0.0
    best: tuple[float, float] | None = None
    best_epoch: int = 0
    since: int = 0


@dataclass
class State:
    """All that changes while a run goes on, with the folder where it is kept."""

    room: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    position: Position

    def save(self) -> None:
        """Write all of it, whole or not at all."""
        found = self.optimizer.state_dict()
        tensors = {f"model.{name}": value for name, value in learned(self.model).items()}
        for number, values in found["state"].items():
            tensors.update({f"optimizer.{number}.{name}": value for name, value in values.items()})
        tensors["rng"] = torch.get_rng_state()
        if (device := self._device()).type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
        told = {
            "position": asdict(self.position),
            "groups": found["param_groups"],
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        _write(self.room / STATE, tensors, {"told": json.dumps(told)})
        for path in set(self.room.glob(BESTS)) - {self._best()}:
            path.unlink()

    def load(self) -> bool:
        """Take up what was saved; says whether there was anything.

        Raises:
            FailedPrecondition: it can't be read, or is another model's.
        """
        path = self.room / STATE
        if not path.exists():
            return False
        try:
            tensors, metadata = _read(path)
            told = json.loads(metadata["told"])
            restore(self.model, _below("model", tensors))
            self.optimizer.load_state_dict({"state": _slots(tensors), "param_groups": told["groups"]})
            self.schedule.load_state_dict(told["schedule"])
            self.scaler.load_state_dict(told["scaler"])
            torch.set_rng_state(tensors["rng"])
            if (device := self._device()).type == "cuda":
                torch.cuda.set_rng_state(tensors["rng.cuda"], device)
            self.position = Position(**told["position"])
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise FailedPrecondition(
                f"{path} can't be gone on from ({error}); remove {self.room} to begin anew"
            ) from error
        if self.position.best is not None:
            self.position.best = (self.position.best[0], self.position.best[1])  # JSON made a list of it
        return True

    def keep_best(self) -> None:
        """Remember the weights as they are, the position's best; those before stay until the next ``save``."""
        _write(self._best(), learned(self.model), {})

    def take_best(self) -> None:
        """Put the best weights back."""
        restore(self.model, _read(self._best())[0])

    def _best(self) -> Path:
        return self.room / f"best-{self.position.best_epoch}.safetensors"

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _slots(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _below("optimizer", tensors).items():
        number, _, key = name.partition(".")
        slots.setdefault(int(number), {})[key] = value
    return slots


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        names = file.keys()  # no mapping: it can't be gone through
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part, metadata)
    _settle(part, path)


def _settle(part: Path, path: Path) -> None:
    """Let ``part`` take the place of ``path``, both on the disk for good."""
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def enter(room: Path, asked: Mapping[str, Any]) -> None:
    """Make the folder of the run, or see that what has begun there was asked for just this.

    Raises:
        FailedPrecondition: it is another run's; the error says what differs.
    """
    path = room / RUN
    if path.exists() and (room / STATE).exists():
        before = json.loads(path.read_text())
        wanted = json.loads(json.dumps(asked))
        differs = [f"{key} was {before.get(key)}, is {wanted.get(key)}" for key in sorted({*before, *wanted})
                   if before.get(key) != wanted.get(key)]  # fmt: skip
        if differs:
            raise FailedPrecondition(
                f"{room} is of another run ({'; '.join(differs)}); remove it, or have the run's state kept elsewhere"
            )
        return
    room.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asked, indent=2) + "\n")
    _settle(part, path)
