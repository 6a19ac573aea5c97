"""What every training script shares: checkpoints that survive a kill, a moving average of the weights, progress."""

from __future__ import annotations

import argparse
import copy
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def arguments(description: str, steps: int, lr: float, batch: int) -> argparse.ArgumentParser:
    """The flags all scripts have in common, with this script's defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=Path("out/train"), help="folder of checkpoints and caches")
    parser.add_argument("--steps", type=int, default=steps, help="length of the learning-rate schedule")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    return parser


def autocast() -> torch.autocast:
    """bfloat16 where the processor computes in it; elsewhere, where it would be emulated many times slower, float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


class Ema:
    """An exponential moving average of a module's parameters and buffers (Polyak averaging, warmed up as in TF)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.module.state_dict().values(), module.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


@dataclass
class Run:
    """Everything a training run must remember to go on as if it had never stopped."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    rng: np.random.Generator
    path: Path
    step: int = 0
    stopped: bool = False
    saved: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Start or go on, and say which. From here on SIGTERM ends the run after its step, with a checkpoint."""
        print("resumed" if self.load() else "started", "at step", self.step, flush=True)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))

    def going(self, steps: int) -> bool:
        """Whether there is another step to do."""
        return self.step < steps and not self.stopped

    def learn(self, loss: torch.Tensor) -> None:
        """One optimizer step on this loss, gradients clipped to norm 1, and the average along with it."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.model, self.step)

    def save(self) -> None:
        """Write the checkpoint whole or not at all: a kill in the middle leaves the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "numpy_rng": self.rng.bit_generator.state,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.path)
        self.saved = time.monotonic()

    def load(self) -> bool:
        """Take up the checkpoint if there is one; says whether there was."""
        if not self.path.exists():
            return False
        state: dict[str, Any] = torch.load(self.path, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        self.rng.bit_generator.state = state["numpy_rng"]
        self.step = state["step"]
        return True

    def save_if_due(self, minutes: float) -> None:
        if time.monotonic() - self.saved > minutes * 60:
            self.save()


def set_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float, warmup: int = 100) -> None:
    """Linear warm-up, then a cosine down to a hundredth of the peak (Loshchilov and Hutter, SGDR, 2017).

    A parameter group's own `scale` multiplies its rate.
    """
    done = min(step / max(steps, 1), 1.0)
    rate = peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))) * min((step + 1) / warmup, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


class Progress:
    """Prints means of named values every so many steps, with the time a step takes and the time left."""

    def __init__(self, steps: int, every: int = 50) -> None:
        self.steps, self.every = steps, every
        self.sums: dict[str, float] = {}
        self.count, self.start = 0, time.monotonic()

    def add(self, step: int, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if step % self.every:
            return
        seconds = (time.monotonic() - self.start) / self.count
        means = "  ".join(f"{name} {total / self.count:.4f}" for name, total in self.sums.items())
        left = seconds * max(self.steps - step, 0) / 60
        print(f"step {step}/{self.steps}  {means}  {seconds:.2f} s/step  {left:.0f} min left", flush=True)
        self.sums, self.count, self.start = {}, 0, time.monotonic()
