"""Every scheduler is frozen and restored at every evaluation, in every mode."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from imagemesh_services.diffusion.backend import BACKENDS, DiffusionModel
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler
from tests.support.backends import load_first
from tests.support.freezing import MODES, every_mode, handed_over, undisturbed

# diffusers' IPNDM can't begin with a picture.
CASES = [
    (name, mode)
    for name in sorted(SCHEDULERS)
    for mode in MODES
    if name != "IPNDM" or mode in ("text to image", "variation")
]


@pytest.fixture(scope="module")
def model(models: Path) -> DiffusionModel:
    return load_first(BACKENDS, "torch", DiffusionConfig, models)


@pytest.fixture(scope="module")
def other(models: Path) -> DiffusionModel:
    return load_first(BACKENDS, "torch", DiffusionConfig, models)


@pytest.fixture(scope="module")
def count() -> list[int]:
    return []


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_run_goes_on_from_every_evaluation_bit_by_bit(
    model: DiffusionModel, other: DiffusionModel, name: str, mode: str, count: list[int], figures: dict[str, str]
) -> None:
    inputs = dataclasses.replace(every_mode(32)[mode], scheduler=find_scheduler(name), steps=5)
    wanted = undisturbed(model, inputs)
    for at in range(model.start(inputs).evaluations):
        np.testing.assert_array_equal(handed_over(model, other, inputs, at), wanted, err_msg=f"at {at}")
        count.append(at)
    figures["checkpoints restored, each picture bit-identical"] = str(len(count))
