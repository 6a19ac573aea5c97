"""Several ControlNets of one generation: added up at the source, as diffusers' MultiControlNetModel adds them."""

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.controlnet.backend import BACKENDS, ControlModel, Part
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.session import Session, Unit
from tests.support.backends import load_first

numbers = np.random.default_rng(3)
PICTURES = numbers.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
EMBEDDINGS = numbers.normal(size=(4, 5, 32)).astype(np.float32)
SAMPLE = numbers.normal(size=(4, 4, 8, 8)).astype(np.float32)
SCALES = (0.7, 1.0, 0.3)
NEGATIVE = 2


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest, models: Path) -> ControlModel:
    return load_first(BACKENDS, request.param, ControlNetConfig, models)


@pytest.fixture(scope="module")
def torch_model(models: Path) -> ControlModel:
    return load_first(BACKENDS, "torch", ControlNetConfig, models)


def session(model: ControlModel, guesses: tuple[bool, ...], **more: Any) -> Session:
    units = [Unit(model, PICTURES[i], SCALES[i], guess, **more) for i, guess in enumerate(guesses)]
    return Session(units, EMBEDDINGS, {}, NEGATIVE)


def told(session: Session, *places: int) -> list[np.ndarray]:
    parts: list[Part] = []
    session.residuals(SAMPLE, 601.0, places, parts.append)
    return [*(one for part in parts for one in part.down), parts[-1].mid]


def same(ours: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def pixels(picture: np.ndarray, rows: int) -> torch.Tensor:
    return (torch.tensor(picture) / 255).permute(2, 0, 1).repeat(rows, 1, 1, 1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_units_are_added_in_their_order(model, count):
    together = session(model, (False,) * 3)
    alone = [told(together, place) for place in range(count)]
    wanted = alone[0]
    for more in alone[1:]:
        wanted = [one + other for one, other in zip(wanted, more, strict=True)]
    same(told(together, *range(count)), wanted)


def test_units_that_are_not_at_work_are_not_asked(model, monkeypatch):
    asked = session(model, (False,) * 3)
    same(told(asked, 0, 2), [a + b for a, b in zip(told(asked, 0), told(asked, 2), strict=True)])
    monkeypatch.setattr(asked._runs[1], "residuals", None)
    told(asked, 0, 2)


def test_an_empty_part_tells_that_the_last_unit_begins(model, monkeypatch):
    asked = session(model, (False, False))
    parts: list[Part] = []
    seen: list[int] = []
    for run in asked._runs:
        monkeypatch.setattr(run, "residuals", partial(noted, run.residuals, parts, seen))
    asked.residuals(SAMPLE, 601.0, (0, 1), parts.append)
    assert seen == [0, 1]
    assert (list(parts[0].down), parts[0].mid) == ([], None)
    assert all(part.down or part.mid is not None for part in parts[1:])


def noted(residuals: Any, parts: list[Part], seen: list[int], *step: Any) -> None:
    """The unit's residuals, after a note of how many parts had left when it was asked."""
    seen.append(len(parts))
    residuals(*step)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_a_sum_is_rounded_as_numpy_rounds_it(model, dtype):
    one, other = numbers.normal(size=(2, 2, 8, 16, 16)).astype(dtype)
    other.flags.writeable = False  # as what came in a message
    found = model.plus(one, other)
    assert (found.dtype, found.tobytes()) == (one.dtype, (one + other).tobytes())


def test_what_cannot_be_added_is_refused(model):
    with pytest.raises(ValueError, match="shapes"):
        model.plus(np.zeros((2, 3), np.float16), np.zeros((2, 4), np.float16))


def test_guessing_units_answer_for_the_prompts_rows_alone(model):
    guessing = told(session(model, (True, True)), 0, 1)
    assert {len(one) for one in guessing} == {len(SAMPLE) - NEGATIVE}


def test_a_guessing_unit_beside_another_adds_nothing_to_the_negative_prompts_rows(model):
    for guesses in ((True, False), (False, True)):
        mixed = session(model, guesses)
        both, plain = told(mixed, 0, 1), told(mixed, guesses.index(False))
        for one, other in zip(both, plain, strict=True):
            np.testing.assert_array_equal(one[:NEGATIVE], other[:NEGATIVE])
        assert any(np.abs(one[NEGATIVE:] - other[NEGATIVE:]).max() > 0 for one, other in zip(both, plain, strict=True))


def test_block_weights_of_another_count_are_refused_by_name(model):
    with pytest.raises(InvalidArgument, match=f"none, or {model.count}") as caught:
        session(model, (False,), block_weights=(1.0,) * (model.count + 1))
    assert caught.value.field == "start.units[0].block_weights"


@pytest.mark.parametrize("shorter", [0, 1])
def test_a_unit_of_another_family_is_named(torch_model, shorter):
    """Whichever of them has fewer residuals."""
    fake = load_first(BACKENDS, "fake", ControlNetConfig, Path())
    models = [torch_model, torch_model]
    models[shorter] = fake
    units = [Unit(one, PICTURES[0], 1.0) for one in models]
    with pytest.raises(InvalidArgument, match="can be added to the units' before it") as caught:
        told(Session(units, EMBEDDINGS, {}, NEGATIVE), 0, 1)
    assert caught.value.field == "start.units[1].model"


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_torch_equals_the_librarys_sum(torch_model, models: Path, count, guess):
    nets = [diffusers.ControlNetModel.from_pretrained(models / "tiny-controlnet").eval() for _ in range(count)]
    rows = slice(NEGATIVE if guess else 0, None)
    asked = torch.tensor(SAMPLE[rows])
    with torch.inference_mode():
        down, mid = diffusers.MultiControlNetModel(nets)(
            asked, torch.tensor(601.0), encoder_hidden_states=torch.tensor(EMBEDDINGS[rows]),
            controlnet_cond=[pixels(one, len(asked)) for one in PICTURES],
            conditioning_scale=list(SCALES), guess_mode=guess, return_dict=False,
        )  # fmt: skip
    for one, other in zip(told(session(torch_model, (guess,) * count), *range(count)), [*down, mid], strict=True):
        np.testing.assert_allclose(one, other, rtol=3e-5, atol=1e-5)
