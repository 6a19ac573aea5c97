"""What every family with a transformer promises at the sampler's seam: shared steps, checkpoints, refusals."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_services.diffusion.backend import BACKENDS, ImageInputs, Moments, SampleInputs
from imagemesh_services.diffusion.checkpoint import read_message, to_message
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.guiders import find_guider
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler
from tests.support import tiny_transformers
from tests.support.backends import load_first

FAMILIES = {
    "sd3": tiny_transformers.build_sd3,
    "flux": tiny_transformers.build_flux,
    "qwen-image": tiny_transformers.build_qwen_image,
    "z-image": tiny_transformers.build_z_image,
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(family)
    FAMILIES[family](root / family)
    return root


@pytest.fixture(scope="module")
def load(folder: Path) -> Callable[[], Any]:
    return lambda: load_first(BACKENDS, "torch", DiffusionConfig, folder)


@pytest.fixture(scope="module")
def model(load: Callable[[], Any]) -> Any:
    return load()


def inputs(model: Any, *, seed: int = 0, length: int = 5, **settings: Any) -> SampleInputs:
    """A request with random embeddings of the widths that the model wants."""
    numbers = np.random.default_rng(seed)
    conditioning: dict[str, np.ndarray] = {}
    for sign, tokens in (("", length), ("negative_", length if model.wants.equal else length + 3)):
        for name in model.wants.names if not sign or model.wants.negative else ():
            if name.endswith("_mask"):
                conditioning[sign + name] = np.ones((1, tokens), np.int64)
            else:
                shape = (1, model.widths[name]) if "pooled" in name else (1, tokens, model.widths[name])
                conditioning[sign + name] = numbers.normal(size=shape).astype(np.float32)
    scheduler = find_scheduler(settings.pop("scheduler", ""))
    values = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0, "seeds": (seed,), **settings}
    return SampleInputs(conditioning, scheduler=scheduler, guidable=model.wants.negative, **values)


def run_out(model: Any, runs: list[Any]) -> list[np.ndarray]:
    """All runs to their ends, those that are not done yet together."""
    left = list(range(len(runs)))
    done = dict.fromkeys(left, 0)
    while left:
        assert list(model.advance([runs[i] for i in left], [None] * len(left))) == [None] * len(left)
        done = {i: count + (i in left) for i, count in done.items()}
        left = [i for i in left if done[i] < runs[i].evaluations]
    return [run.latents() for run in runs]


def test_requests_share_forwards_and_each_gets_what_it_gets_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        inputs(model, seed=1, steps=5),
        inputs(model, seed=2, steps=3, scheduler="Euler a", guidance_scale=1.0),
        inputs(model, seed=3, steps=4, scheduler="LCM", seeds=(8, 9), guidance_scale=6.0),
    ]
    alone = [run_out(model, [model.start(one)])[0] for one in requests]
    runs = [model.start(one) for one in requests]
    assert len({run.key for run in runs}) == 1
    forwards = []
    with monkeypatch.context() as patch:
        whole = model.transformer.forward
        patch.setattr(model.transformer, "forward", lambda **call: forwards.append(0) or whole(**call))
        together = run_out(model, runs)
    assert len(forwards) == max(run.evaluations for run in runs)
    for mine, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    assert not np.allclose(alone[0], alone[1], atol=0.1)


def advance(model: Any, run: Any, count: int) -> None:
    for _ in range(count):
        assert list(model.advance([run], [None])) == [None]


def started(model: Any, request: SampleInputs) -> tuple[Any, str]:
    """The run, or why there is none."""
    try:
        return model.start(request), ""
    except InvalidArgument as error:
        return None, str(error)


def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(model: Any, load: Callable[[], Any]) -> None:
    """With every scheduler that the family can have; the others are refused before anything is done."""
    other = load()
    assert model.fingerprint == other.fingerprint
    ran = set()
    for scheduler in ("", *SCHEDULERS):
        request = inputs(model, seed=1, seeds=(7, 8), scheduler=scheduler)
        run, refusal = started(model, request)
        if run is None:
            assert refusal.startswith("scheduler"), refusal
            continue
        ran.add(scheduler)
        frozen = {}
        for at in range(1, run.evaluations):
            advance(model, run, 1)
            frozen[at] = to_message(run.checkpoint(), model.fingerprint)
        advance(model, run, 1)
        for at in sorted({1, run.evaluations // 2, run.evaluations - 1}):
            successor = other.start(request)
            message = type(frozen[at]).FromString(frozen[at].SerializeToString())
            successor.restore(read_message(message, other.fingerprint))
            advance(other, successor, successor.evaluations - at)
            np.testing.assert_array_equal(successor.latents(), run.latents(), err_msg=f"{scheduler} at {at}")
            assert successor.steps_done() == request.steps
    assert ran >= {"", "Euler", "Euler a", "LCM", "Euler Karras", "Euler Exponential", "Euler Beta"}


def test_guiders_that_leave_the_layers_alone_guide_and_go_on_from_a_checkpoint(model: Any) -> None:
    options = {
        "CFG": {"start": "0.4"},
        "CFG-Zero*": {"zero_init_steps": "0"},
        "APG": {"adaptive_projected_guidance_momentum": "-0.5"},
    }
    kinds = [find_guider(name, given) for name, given in options.items()]
    if not model.wants.negative:
        for kind in kinds:
            with pytest.raises(InvalidArgument, match="guider must be CFG without options"):
                model.start(inputs(model, guider=kind))
        return
    (plain,) = run_out(model, [model.start(inputs(model, seed=1))])
    for kind in kinds:
        request = inputs(model, seed=1, guider=kind)
        run, successor = model.start(request), model.start(request)
        advance(model, run, 2)
        successor.restore(run.checkpoint())
        for one in (run, successor):
            advance(model, one, run.evaluations - 2)
        np.testing.assert_array_equal(successor.latents(), run.latents(), err_msg=kind.name)
        assert not np.allclose(run.latents(), plain, atol=1e-2), kind.name


def test_a_preview_has_the_form_of_the_latents_and_ends_as_they_do(model: Any) -> None:
    run = model.start(inputs(model, seed=1))
    shape = (1, 16, 64 // model.scale_factor, 64 // model.scale_factor)
    assert run.preview().shape == shape
    far = None
    for _ in range(run.evaluations):
        assert list(model.advance([run], [None])) == [None]
        far = run.preview() if far is None else far
    assert run.latents().shape == shape
    np.testing.assert_allclose(run.preview(), run.latents(), atol=1e-4)
    assert not np.allclose(far, run.latents(), atol=1e-2)


def test_one_bad_row_fails_alone(model: Any) -> None:
    sick = inputs(model, seed=2)
    sick = dataclasses.replace(
        sick,
        conditioning={**sick.conditioning, "prompt_embeds": np.full_like(sick.conditioning["prompt_embeds"], np.nan)},
    )
    good, bad = model.start(inputs(model, seed=1)), model.start(sick)
    (wanted,) = run_out(model, [model.start(inputs(model, seed=1))])
    first, second = model.advance([good, bad], [None, None])
    assert first is None
    assert isinstance(second, NotFinite)
    for _ in range(good.evaluations - 1):
        assert list(model.advance([good], [None])) == [None]
    np.testing.assert_allclose(good.latents(), wanted, atol=2e-4)


def test_what_the_family_cannot_do_is_refused_by_name(model: Any) -> None:
    request = inputs(model)
    wrong = {name: value[..., :-1] if "embeds" in name else value for name, value in request.conditioning.items()}
    latents = np.zeros((1, 16, 8, 8), np.float32)
    mask = np.ones((1, 1, 64, 64), np.uint8)
    masked = ImageInputs(Moments(latents, latents), 0.5, mask)
    for change, said in (
        ({"conditioning": wrong}, r"conditioning\['prompt_embeds'\] must be of width"),
        ({"scheduler": find_scheduler("DDIM")}, "scheduler must be one for flow-matching models: .*Euler"),
        ({"scheduler": find_scheduler("UniPC Karras")}, "scheduler must be one for flow-matching models"),
        ({"guider": find_guider("PAG", {})}, "guider must be (one that leaves the layers|CFG without)"),
        ({"image": masked}, "inputs must be"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            model.start(dataclasses.replace(request, **change))


def test_noise_turned_all_the_way_is_the_other_seeds(model: Any) -> None:
    def drawn(**settings: Any) -> np.ndarray:
        return run_out(model, [model.start(inputs(model, steps=2, **settings))])[0]

    turned = {"variation_seeds": (9, 4), "variation_strength": 1.0}
    np.testing.assert_allclose(drawn(seeds=(1, 2), **turned), drawn(seeds=(9, 4)), atol=2e-4)
    near, own = drawn(seeds=(1, 2), **{**turned, "variation_strength": 0.1}), drawn(seeds=(1, 2))
    assert not np.allclose(near, own, atol=1e-2)
    assert np.abs(near - own).mean() < np.abs(near - drawn(seeds=(9, 4))).mean()


def test_a_picture_to_start_from_leaves_a_share_of_the_steps_and_counts_them_as_they_are(model: Any) -> None:
    side = 64 // model.scale_factor
    numbers = np.random.default_rng(5).normal(size=(1, 16, side, side)).astype(np.float32)
    for source in (Moments(numbers, np.full_like(numbers, -30)), numbers[..., : side // 2, : side // 2]):
        request = inputs(model, seed=1, steps=5, image=ImageInputs(source, 0.5), rounds_up=model.rounds_up)
        run = model.start(request)
        assert run.evaluations == request.steps_to_do == 3
        told = []
        for _ in range(run.evaluations):
            assert list(model.advance([run], [None])) == [None]
            told.append(run.steps_done())
        assert told == [1, 2, 3]
        assert run.latents().shape == numbers.shape


def test_a_trial_runs_and_is_of_one_row(model: Any) -> None:
    trial = model.trial(96, 64)
    run = model.start(trial)
    advance(model, run, 1)
    assert (trial.rows, trial.width, trial.height) == (1, 96, 64)
    assert run.latents().shape == (1, 16, 64 // model.scale_factor, 96 // model.scale_factor)
