"""A run that is cut off and resumed ends where an unbroken one ends."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imagemesh_training.common import Ema, Run, autocast, set_lr


def new_run(path: Path) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Run(model, optimizer, Ema(model, 0.9), np.random.default_rng(0), path)


def train(run: Run, until: int) -> None:
    """Steps that draw from both generators, as the real scripts do."""
    while run.step < until:
        set_lr(run.optimizer, run.step, 10, 1e-2, warmup=2)
        inputs = torch.from_numpy(run.rng.normal(size=(5, 4)).astype(np.float32))
        run.learn((run.model(inputs) - torch.randn(5, 2)).square().mean())


def state_of(run: Run) -> list[torch.Tensor]:
    return [*run.model.state_dict().values(), *run.ema.module.state_dict().values(), torch.get_rng_state()]


def test_a_resumed_run_ends_in_the_same_state(tmp_path: Path) -> None:
    whole = new_run(tmp_path / "whole.pt")
    train(whole, 10)
    expected = [tensor.clone() for tensor in state_of(whole)]

    first = new_run(tmp_path / "broken.pt")
    train(first, 4)
    first.save()
    train(first, 7)  # lost: the machine went away before the next checkpoint
    second = new_run(tmp_path / "broken.pt")
    assert second.load()
    assert second.step == 4
    train(second, 10)

    assert all(torch.equal(a, b) for a, b in zip(expected, state_of(second), strict=True))
    assert second.rng.random() == whole.rng.random()


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run.pt")
    train(run, 3)
    run.save()
    run.path.with_suffix(".part").write_bytes(b"half a checkp")
    again = new_run(tmp_path / "run.pt")
    assert again.load()
    assert again.step == 3


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    assert not new_run(tmp_path / "none.pt").load()


def test_learning_rate_warms_up_peaks_and_falls_to_a_hundredth() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = []
    for step in (0, 10, 500, 1000, 2000):
        set_lr(optimizer, step, 1000, 1.0, warmup=10)
        rates.append(round(optimizer.param_groups[0]["lr"], 3))
    assert rates == [0.1, 1.0, 0.505, 0.01, 0.01]


@pytest.mark.parametrize(("bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_bfloat16_is_used_only_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is (torch.bfloat16 if bf16 or amx else torch.float32)
