"""The training itself: steps, validation after each epoch, and a state on the disk to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import get_scheduler

from imagemesh_runtime.errors import MeshError, NotFinite
from imagemesh_training.finetune import parts
from imagemesh_training.finetune.augment import changed
from imagemesh_training.finetune.pictures import Data, Picture, Source
from imagemesh_training.finetune.plan import SCHEDULES, Plan, pick_precision
from imagemesh_training.finetune.records import Records
from imagemesh_training.finetune.state import Position, State

Preprocess = Callable[[Picture], NDArray[np.float32]]
_MOST_NORM: Final = 1.0
_NOTABLE: Final = 1e-4  # by which the loss must be less, where the accuracy is the same, to be better
_REPORTS: Final = 10  # of the loss, an epoch


class Stopped(MeshError):
    """The run was told to stop, and can be gone on with."""


@dataclass(frozen=True)
class Outcome:
    """A run that is over.

    Attributes:
        model: the best epoch's, plain and in eval mode.
        epochs: that were gone through.
        trained: parameters that learned, of ``parameters``.
        seconds: of this process.
    """

    model: Any
    accuracy: float
    loss: float
    epochs: int
    best_epoch: int
    steps: int
    trained: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class _Seen(Dataset[tuple[torch.Tensor, int]]):
    """Pictures as the model wants them, by (epoch, number); the epoch is -1 where they are to stay as they are."""

    source: Source
    preprocess: Preprocess
    plan: Plan

    def __getitem__(self, at: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = at
        picture = self.source.read(index)
        if epoch >= 0:
            picture = changed(picture, self.plan.augment, self.plan.seed, epoch, index)
        return torch.from_numpy(self.preprocess(np.ascontiguousarray(picture))), self.source.labels[index]


@dataclass
class Training:
    """One run.

    Args:
        model: a classifier with a row of its head for each of the data's names; its weights are changed.
        preprocess: uint8 [h, w, 3] to the float32 [3, h, w] that it wants.
        room: a folder of the run's own, see ``state.enter``.
        tell: is told each step, of how many.
        say: is told in a line how it goes.
        save_minutes: how much work a crash may cost.
        workers: processes that read pictures; 0: this one does.
    """

    model: Any
    data: Data
    plan: Plan
    preprocess: Preprocess
    room: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tell: Callable[[int, int], None] = lambda step, steps: None
    say: Callable[[str], None] = lambda line: None
    save_minutes: float = 5.0
    workers: int = 0
    stopping: bool = False

    def run(self) -> Outcome:
        """Train to the end, from wherever the run's state is.

        Raises:
            InvalidArgument: the plan doesn't fit the model or the device.
            FailedPrecondition: the state can't be gone on from.
            NotFinite: the loss is no number any more.
            Stopped: ``stopping`` was set.
        """
        begun = time.monotonic()
        self._dtype = pick_precision(self.plan.precision, self.device)
        torch.manual_seed(self.plan.seed)
        learner = parts.made_to_learn(self.model, self.plan).to(self.device)
        self._state = state = self._begin(learner)
        resumed = state.load()
        at = state.position
        self._records = Records(self.room, at.step, at.epochs)
        self.say(f"{'resumed' if resumed else 'started'} at step {at.step} of {self._steps}")
        self._saved = time.monotonic()
        try:
            while at.epochs < self.plan.epochs and not self._tired(at):
                self._epoch(learner)
        finally:
            self._records.close()
        state.take_best()
        trained, parameters = parts.counts(learner)
        assert at.best is not None
        return Outcome(
            parts.merged(learner).eval().requires_grad_(False), at.best[0], -at.best[1], at.epochs, at.best_epoch,
            at.step, trained, parameters, time.monotonic() - begun,
        )  # fmt: skip

    @property
    def _in_an_epoch(self) -> int:
        """Steps."""
        batches = -(-len(self.data.train.labels) // self.plan.batch)
        return -(-batches // self.plan.accumulate)

    @property
    def _steps(self) -> int:
        return self._in_an_epoch * self.plan.epochs

    def _begin(self, learner: nn.Module) -> State:
        learning = [value for value in learner.parameters() if value.requires_grad]
        groups = [
            {"params": [value for value in learning if value.ndim > 1], "weight_decay": self.plan.weight_decay},
            {"params": [value for value in learning if value.ndim <= 1], "weight_decay": 0.0},  # biases and norms
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.plan.rate)
        warmup = round(self._steps * self.plan.warmup)
        schedule = get_scheduler(SCHEDULES[self.plan.schedule], optimizer, warmup, self._steps)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16)
        return State(self.room, learner, optimizer, schedule, scaler, Position())

    def _tired(self, at: Position) -> bool:
        return bool(self.plan.patience) and at.since >= self.plan.patience

    def _epoch(self, learner: nn.Module) -> None:
        state, at = self._state, self._state.position
        parts.set_training(learner)
        for group in self._groups(at.epochs, at.step - at.epochs * self._in_an_epoch):
            at.loss += self._step(learner, group)
            at.step += 1
            self.tell(at.step, self._steps)
            done = at.step - at.epochs * self._in_an_epoch
            if done % max(1, self._in_an_epoch // _REPORTS) == 0 or done == self._in_an_epoch:
                rate = float(state.schedule.get_last_lr()[0])
                self._records.tell(at.step, at.epochs + 1, train_loss=at.loss / done, train_rate=rate)
            self._save_if_due()
        accuracy, loss = self._validate(learner)  # before the epoch counts as done: it may be stopped in the midst
        mean, at.loss = at.loss / self._in_an_epoch, 0.0
        at.epochs += 1
        self._records.tell(at.step, at.epochs, validation_loss=loss, accuracy=accuracy)
        self.say(
            f"epoch {at.epochs}/{self.plan.epochs}: loss {mean:.4f}, validation {loss:.4f}, accuracy {accuracy:.1%}"
        )
        if at.best is None or (accuracy, -loss - _NOTABLE) > at.best:
            at.best, at.best_epoch, at.since = (accuracy, -loss), at.epochs, 0
            state.keep_best()
        else:
            at.since += 1
        self._save()

    def _save_if_due(self) -> None:
        if self.stopping:
            self._save()
            raise Stopped(f"stopped at step {self._state.position.step} of {self._steps}; the same again goes on there")
        if time.monotonic() - self._saved > self.save_minutes * 60:
            self._save()

    def _save(self) -> None:
        self._state.save()
        self._saved = time.monotonic()

    def _groups(self, epoch: int, done: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """The batches of each step of an epoch but the first ``done``; which they are follows from the seed."""
        order = np.random.default_rng((self.plan.seed, epoch)).permutation(len(self.data.train.labels))
        size, many = self.plan.batch, self.plan.accumulate
        batches = [[(epoch, int(i)) for i in order[at : at + size]] for at in range(0, len(order), size)]
        left = iter(self._loader(self.data.train, batches[done * many :]))
        while group := [batch for _, batch in zip(range(many), left, strict=False)]:  # in this order: none is lost
            yield group

    def _loader(self, source: Source, batches: Sequence[Sequence[tuple[int, int]]]) -> Any:
        # A generator of its own: the loader would draw from the one that dropout draws from.
        seen = _Seen(source, self.preprocess, self.plan)
        return DataLoader(seen, batch_sampler=cast(Any, batches), num_workers=self.workers, generator=torch.Generator())

    def _step(self, learner: nn.Module, group: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """One step on the mean over all pictures of the group; the answer is their loss."""
        state, total = self._state, sum(len(labels) for _, labels in group)
        state.optimizer.zero_grad(set_to_none=True)
        sum_of_losses = 0.0
        for pixels, labels in group:
            logits, there = self._logits(learner, pixels), labels.to(self.device)
            loss = functional.cross_entropy(logits, there, reduction="sum", label_smoothing=self.plan.smoothing)
            torch.autograd.backward(state.scaler.scale(loss / total))
            sum_of_losses += loss.item()
        if not np.isfinite(sum_of_losses):
            raise NotFinite(type(self.model).__name__, f"losses at step {state.position.step + 1}")
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_([value for value in learner.parameters() if value.requires_grad], _MOST_NORM)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.schedule.step()
        return sum_of_losses / total

    def _logits(self, learner: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = learner(pixels.to(self.device)).logits
        return cast(torch.Tensor, logits.float())

    @torch.no_grad()
    def _validate(self, learner: nn.Module) -> tuple[float, float]:
        """Accuracy and mean loss on the pictures that nothing is learned from."""
        learner.eval()
        count, size = len(self.data.validation.labels), self.plan.batch
        batches = [[(-1, i) for i in range(at, min(at + size, count))] for at in range(0, count, size)]
        right, loss = 0, 0.0
        for pixels, labels in self._loader(self.data.validation, batches):
            self._save_if_due()
            logits, there = self._logits(learner, pixels), labels.to(self.device)
            loss += functional.cross_entropy(logits, there, reduction="sum").item()
            right += int((logits.argmax(-1) == there).sum())
        return right / count, loss / count
