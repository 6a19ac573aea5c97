"""What every ControlNet backend promises at its seam, and what the torch one owes to diffusers."""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.controlnet.backend import BACKENDS, ControlInputs, ControlModel, ControlRun, Part, whole
from imagemesh_services.controlnet.config import ControlNetConfig
from tests.support.backends import load_first

ROWS, TOKENS, WIDTH, HEIGHT_PIXELS, WIDTH_PIXELS = 2, 5, 32, 64, 128
TIMESTEP = 601.0


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest, models: Path) -> ControlModel:
    return load_first(BACKENDS, request.param, ControlNetConfig, models)


@pytest.fixture(scope="module")
def torch_model(models: Path) -> ControlModel:
    return load_first(BACKENDS, "torch", ControlNetConfig, models)


@pytest.fixture(scope="module")
def reference(models: Path) -> diffusers.ControlNetModel:
    return diffusers.ControlNetModel.from_pretrained(models / "tiny-controlnet").eval()


@pytest.fixture
def inputs() -> ControlInputs:
    numbers = np.random.default_rng(0)
    image = numbers.integers(0, 256, (HEIGHT_PIXELS, WIDTH_PIXELS, 3), dtype=np.uint8)
    embeddings = numbers.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    for array in (image, embeddings):
        array.flags.writeable = False  # as arrays that share a message's memory are
    return ControlInputs(image, embeddings, 1.0)


@pytest.fixture
def sample() -> np.ndarray:
    shape = (ROWS, 4, HEIGHT_PIXELS // 8, WIDTH_PIXELS // 8)
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    array.flags.writeable = False
    return array


def answer(model: ControlModel, inputs: ControlInputs, sample: np.ndarray, timestep: float = TIMESTEP) -> list[Any]:
    """All residuals of one step, the middle block's last."""
    return ask(model.start(inputs), sample, timestep)


def ask(run: ControlRun, sample: np.ndarray, timestep: float = TIMESTEP) -> list[Any]:
    part = whole(run, sample, timestep)
    return [*part.down, part.mid]


def assert_same(ours: list[Any], theirs: list[Any], atol: float = 0.0, rtol: float = 0.0) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def apart(ours: list[Any], theirs: list[Any]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True))


def test_residuals_are_finite_and_have_a_row_for_each_row(model, inputs, sample):
    for residual in answer(model, inputs, sample):
        assert residual.dtype == np.float32
        assert residual.shape[0] == ROWS
        assert residual.ndim == 4
        assert np.isfinite(residual).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rows_may_come_in_every_float_type(model, inputs, sample, dtype):
    rounded = sample.astype(dtype)
    assert_same(answer(model, inputs, rounded), answer(model, inputs, rounded.astype(np.float32)))


def test_the_same_step_has_the_same_residuals_whatever_came_before(model, inputs, sample):
    run = model.start(inputs)
    first = ask(run, sample)
    ask(run, -sample, 1.0)
    assert_same(first, ask(run, sample))


def test_runs_taking_turns_do_not_disturb_each_other(model, inputs, sample):
    other = dataclasses.replace(inputs, image=255 - inputs.image, scale=0.5)
    alone = [answer(model, one, sample) for one in (inputs, other)]
    runs = [model.start(one) for one in (inputs, other)]
    for run, wanted in zip(runs, alone, strict=True):
        assert_same(ask(run, sample), wanted)


def test_another_picture_has_other_residuals(model, inputs, sample):
    other = dataclasses.replace(inputs, image=inputs.image // 4)
    assert apart(answer(model, inputs, sample), answer(model, other, sample)) > 1e-2


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 10.0])
def test_residuals_are_linear_in_the_scale(model, inputs, sample, scale):
    scaled = answer(model, dataclasses.replace(inputs, scale=scale), sample)
    plain = answer(model, inputs, sample)
    for one, other in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(one, scale * other, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
def diffusers_residuals(
    reference: diffusers.ControlNetModel, inputs: ControlInputs, sample: np.ndarray, timestep: float
) -> list[Any]:
    """What ``StableDiffusionControlNetPipeline`` asks its ControlNetModel, put down here once more."""
    processor = diffusers.image_processor.VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    picture = processor.preprocess(inputs.image[None].astype(np.float32) / 255)
    down, mid = reference(
        torch.tensor(sample),
        torch.tensor(timestep),
        encoder_hidden_states=torch.tensor(inputs.embeddings),
        controlnet_cond=picture.repeat(len(sample), 1, 1, 1),
        conditioning_scale=inputs.scale,
        return_dict=False,
    )
    return [one.numpy() for one in (*down, mid)]


@pytest.mark.parametrize("timestep", [0.0, 12.5, TIMESTEP, 999.0])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_torch_gives_diffusers_residuals_in_diffusers_order(torch_model, reference, inputs, sample, timestep, scale):
    inputs = dataclasses.replace(inputs, scale=scale)
    ours = answer(torch_model, inputs, sample, timestep)
    theirs = diffusers_residuals(reference, inputs, sample, timestep)
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    assert_same(ours, theirs, atol=1e-6)


def test_torch_heeds_prompts_and_timesteps(torch_model, inputs, sample):
    plain = answer(torch_model, inputs, sample)
    other = dataclasses.replace(inputs, embeddings=-inputs.embeddings)
    assert apart(plain, answer(torch_model, other, sample)) > 1e-3
    assert apart(plain, answer(torch_model, inputs, sample, 1.0)) > 1e-3


def test_torch_told_of_other_prompts_is_as_if_it_had_begun_with_them(torch_model, inputs, sample):
    other = dataclasses.replace(inputs, embeddings=-inputs.embeddings)
    run = torch_model.start(inputs)
    ask(run, sample)
    run.tell(other.embeddings, other.added)
    for ours, wanted in zip(ask(run, sample), answer(torch_model, other, sample), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_torch_rows_do_not_mix(torch_model, inputs, sample):
    """The negative rows of a guided generation get nothing of the positive ones."""
    together = answer(torch_model, inputs, sample)
    for row in range(ROWS):
        part = slice(row, row + 1)
        alone = answer(torch_model, dataclasses.replace(inputs, embeddings=inputs.embeddings[part]), sample[part])
        assert_same([one[part] for one in together], alone, atol=1e-5, rtol=1e-5)


def test_torch_takes_fewer_rows_for_the_last_ones(torch_model, inputs, sample):
    """As where guidance is off in a step."""
    run = torch_model.start(inputs)
    together, fewer = ask(run, sample), ask(run, sample[1:])
    assert_same([one[1:] for one in together], fewer, atol=1e-5, rtol=1e-5)


def test_torch_refuses_embeddings_of_another_width_by_name(torch_model, inputs):
    wrong = dataclasses.replace(inputs, embeddings=np.zeros((ROWS, TOKENS, 7), np.float32))
    with pytest.raises(InvalidArgument, match="width 7") as caught:
        torch_model.start(wrong)
    assert caught.value.field == "start.encoder_hidden_states"


@pytest.mark.parametrize("shape", [(3, 4, 8, 16), (2, 5, 8, 16), (2, 4, 16, 8), (2, 4, 8, 8), (0, 4, 8, 16)])
def test_torch_refuses_rows_that_do_not_fit_the_picture_or_the_prompts(torch_model, inputs, sample, shape):
    run = torch_model.start(inputs)
    with pytest.raises(InvalidArgument) as caught:
        ask(run, np.zeros(shape, np.float32))
    assert caught.value.field == "step.sample.shape"
    assert "[2, 4, 8, 16]" in str(caught.value)
    ask(run, sample)


def parts_of(run: ControlRun, sample: np.ndarray) -> list[Part]:
    parts: list[Part] = []
    run.residuals(sample, TIMESTEP, parts.append)
    return parts


def test_the_last_part_alone_has_the_middle_residual(model, inputs, sample):
    parts = parts_of(model.start(inputs), sample)
    assert [part.mid is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(len(part.down) for part in parts) + 1 == model.count


def test_torch_tells_of_each_block_before_the_next_one_begins(models: Path, inputs, sample):
    model: Any = load_first(BACKENDS, "torch", ControlNetConfig, models)
    events: list[str] = []
    for i, block in enumerate(model.net.down_blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: events.append(f"block {i}"))
    model.net.mid_block.register_forward_pre_hook(lambda module, args: events.append("middle"))
    model.start(inputs).residuals(sample, TIMESTEP, lambda part: events.append(f"{len(part.down)} residuals"))
    assert events == ["block 0", "1 residuals", "2 residuals", "block 1", "1 residuals", "middle", "0 residuals"]


def test_torch_ends_a_step_that_nobody_listens_to(torch_model, inputs, sample):
    run = torch_model.start(inputs)
    wanted = ask(run, sample)

    def leave(part: Part) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run.residuals(sample, TIMESTEP, leave)
    assert_same(ask(run, sample), wanted)


def test_torch_embeds_the_picture_once(torch_model, inputs, sample, monkeypatch):
    embedded, embed = [], torch_model._embed
    monkeypatch.setattr(torch_model, "_embed", lambda picture: embedded.append(1) or embed(picture))
    run = torch_model.start(inputs)
    for timestep in (981.0, 481.0, 1.0):
        ask(run, sample, timestep)
    assert embedded == [1]


@pytest.fixture(scope="module", params=["rgb", "bgr", "pooled"])
def kind(request: pytest.FixtureRequest, models: Path, tmp_path_factory: Any) -> tuple[Any, Any]:
    """A ControlNet of each kind: the seam's, and the library's own."""
    more = {"bgr": {"controlnet_conditioning_channel_order": "bgr"}, "pooled": {"global_pool_conditions": True}}
    net = diffusers.ControlNetModel.from_pretrained(models / "tiny-controlnet").eval()
    net.register_to_config(**more.get(request.param, {}))
    folder = tmp_path_factory.mktemp("kind")
    net.save_pretrained(folder / "net")
    return load_first(BACKENDS, "torch", ControlNetConfig, folder), net


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("weights", [(), (0.0, 0.25, 0.5, 0.75, 1.5)], ids=["plain", "weighted"])
def test_torch_gives_the_librarys_residuals_bit_by_bit(kind, inputs, sample, guess, weights):
    model, net = kind
    assert model.prompt_rows_only == net.config.global_pool_conditions
    asked = dataclasses.replace(inputs, scale=0.7, guess=guess, block_weights=weights)
    with torch.inference_mode():
        down, mid = net(
            torch.tensor(sample), torch.tensor(TIMESTEP), encoder_hidden_states=torch.tensor(inputs.embeddings),
            controlnet_cond=(torch.tensor(inputs.image) / 255).permute(2, 0, 1).repeat(ROWS, 1, 1, 1),
            conditioning_scale=0.7, guess_mode=guess, return_dict=False,
        )  # fmt: skip
    ours, theirs = answer(model, asked, sample), [*down, mid]
    if weights:  # which the library knows nothing of
        theirs = [one * weight for one, weight in zip(theirs, weights, strict=True)]
    assert_same(ours, theirs, rtol=1e-5 if weights else 0, atol=1e-7 if weights else 0)
