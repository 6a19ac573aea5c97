"""What is saved on ControlNets: nothing unless asked for, just what is asked for, and it is named in the result."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from imagemesh_client import Client, Control, ControlSavings
from imagemesh_runtime.errors import InvalidArgument, MeshError
from imagemesh_runtime.savings import ROUNDINGS, restored, rounded
from imagemesh_services.diffusion import control as control_module
from imagemesh_services.diffusion import steer as steer_module
from imagemesh_services.diffusion.backend import Residuals
from imagemesh_services.diffusion.incoming import Incoming
from tests.support.mesh import running_mesh
from tests.support.reference import pipeline, worst
from tests.support.steering import ask, moved, steered

PROMPT, STEPS = "the red cat", 5
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def ours(client: Client, savings: ControlSavings | None = None, **more: Any) -> Any:
    options: dict[str, Any] = {"steps": STEPS, "guidance": 5.0, "seed": 3, "scheduler": "DDIM", **more}
    controls = [Control(PICTURE, "tiny-controlnet", 0.8)]
    return client.generate(PROMPT, controls=controls, control_savings=savings, **options)


def theirs(models: Path, changed: Callable[[Callable[..., Any]], Callable[..., Any]], **more: Any) -> Any:
    """Of diffusers' pipeline, whose ControlNet's forward is ``changed``."""
    net = diffusers.ControlNetModel.from_pretrained(models / "tiny-controlnet")
    net.forward = changed(net.forward)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **pipeline(models / "tiny-sd").components, controlnet=net, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    made = pipe(
        PROMPT, image=PICTURE, num_inference_steps=STEPS, guidance_scale=5.0, controlnet_conditioning_scale=0.8,
        generator=torch.Generator("cpu").manual_seed(3), output_type="np", **more,
    ).images[0]  # fmt: skip
    return (made * 255).round().astype("uint8")


def every(steps: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A forward that answers the same for so many calls."""

    def changed(forward: Callable[..., Any]) -> Callable[..., Any]:
        answers: list[Any] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            fresh = len(answers) % steps == 0
            answers.append(forward(*args, **kwargs) if fresh else answers[-1])
            return answers[-1]

        return call

    return changed


def of_the_prompt(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that says nothing of the negative prompt's row."""

    def call(*args: Any, **kwargs: Any) -> Any:
        down, mid = forward(*args, **kwargs)
        mask = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
        return [one * mask for one in down], mid * mask

    return call


def test_residuals_serve_several_steps(client: Client, models: Path) -> None:
    made = ours(client, ControlSavings(reuse_steps=2))
    assert worst(made.images[0].to_pil(), theirs(models, every(2))) <= 1
    assert worst(made.images[0].to_pil(), ours(client).images[0].to_pil()) > 1
    assert made.parameters.lossy == {"control_reuse_steps": "2"}
    assert "Control reuse steps: 2" in made.images[0].to_pil().info["parameters"]


def test_the_prompts_half_alone_is_steered(client: Client, models: Path) -> None:
    made = ours(client, ControlSavings(conditional_only=True))
    assert worst(made.images[0].to_pil(), theirs(models, of_the_prompt)) <= 1
    assert worst(made.images[0].to_pil(), ours(client).images[0].to_pil()) > 1
    assert made.parameters.lossy == {"control_conditional_only": "true"}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounded_residuals_draw_nearly_the_same(client: Client, name: str) -> None:
    made, exact = ours(client, ControlSavings(residuals=name)), ours(client)
    away = np.abs(np.asarray(made.images[0].to_pil(), int) - np.asarray(exact.images[0].to_pil(), int))
    assert 0 < away.mean() < 4
    assert made.parameters.lossy == {"control_residuals": name}


def test_without_savings_nothing_is_lost_or_told(client: Client, models: Path) -> None:
    made, asked_for_none = ours(client), ours(client, ControlSavings())
    assert worst(made.images[0].to_pil(), theirs(models, lambda forward: forward)) <= 1
    assert worst(made.images[0].to_pil(), asked_for_none.images[0].to_pil()) == 0
    assert made.parameters.lossy == asked_for_none.parameters.lossy == {}


def test_all_together_and_beside_prompts_that_change(client: Client) -> None:
    savings = ControlSavings(2, True, "int8")
    made = client.generate(
        "a [cat:dog:0.5] on the water", controls=[Control(PICTURE, "tiny-controlnet")], control_savings=savings,
        steps=STEPS, seed=3, n=2,
    )  # fmt: skip
    assert sorted(made.parameters.lossy) == ["control_conditional_only", "control_residuals", "control_reuse_steps"]


@pytest.mark.parametrize(
    ("savings", "controls", "field"),
    [
        (ControlSavings(1001), True, "control_savings.reuse_steps"),
        (ControlSavings(residuals="int4"), True, "control_savings.residuals"),
        (ControlSavings(2), False, "control_savings"),
    ],
)
def test_savings_that_cannot_be_are_refused(client: Client, savings: Any, controls: bool, field: str) -> None:
    with pytest.raises(MeshError, match=field) as caught:
        client.generate(
            PROMPT, steps=1, controls=[Control(PICTURE, "tiny-controlnet")] if controls else [], control_savings=savings
        )
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ROUNDINGS)
async def test_rounded_residuals_are_a_quarter_of_the_bytes(models: Path, name: str) -> None:
    received = []
    answers = []
    for rounding in ("", name):
        async with steered(models, wants_memory=False) as sampler:
            async with sampler.control(1.0, rounding=rounding) as control:
                answers.append(await ask(control))
            received.append(sum(many for way, many in moved(sampler.metrics).items() if way.endswith("received")))
    assert received[1] < received[0] / 3.2
    exact, near = ([*one.down, one.mid] for one in answers)
    for a, b in zip(exact, near, strict=True):
        assert np.abs(a - b).max() <= np.abs(a).max() / (250 if name == "int8" else 25)


async def test_what_came_is_counted_before_it_is_restored_and_that_not_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []
    original = control_module.restored
    monkeypatch.setattr(
        control_module, "restored", lambda *given: threads.append(threading.current_thread()) or original(*given)
    )
    async with steered() as sampler, sampler.control(1.0, rounding="int8") as control:
        found = await ask(control)
        arrays = [*found.down, found.mid]
        assert control.received == sum(one.size + 4 * one.shape[0] * one.shape[1] for one in arrays)
    assert len(threads) == len(arrays)
    assert threading.current_thread() not in threads


async def test_what_is_kept_is_copied_and_that_not_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    original = steer_module._copied
    monkeypatch.setattr(
        steer_module, "_copied", lambda found: threads.append(threading.current_thread()) or original(found)
    )
    inputs = SimpleNamespace(savings=ControlSavings(2), conditions=lambda evaluation, evaluations: (-1,))
    heard = steer_module._Listening(SimpleNamespace(inputs=inputs, started=SimpleNamespace(evaluations=4)))
    came, incoming = np.ones((1, 4, 8, 8), np.float32), Incoming()
    incoming.complete(Residuals([came], came))
    await heard.keep(0, [0], incoming)
    came[:] = 7  # the memory is used again
    kept = heard.kept(1, [0])
    assert kept.mid.max() == kept.down[0].max() == 1
    assert heard.kept(2, [0]) is None
    assert len(threads) == 1
    assert threading.current_thread() not in threads


async def test_a_rounding_that_is_not_there_is_refused(models: Path) -> None:
    async with steered(models) as sampler:
        with pytest.raises((InvalidArgument, MeshError), match=r"start\.residuals"):
            async with sampler.control(1.0, rounding="int4") as control:
                await ask(control)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_what_is_not_finite_is_not_hidden_and_zeros_stay_zeros(name: str) -> None:
    numbers = np.zeros((2, 3, 4, 4), np.float32)
    numbers[1] = np.random.default_rng(0).normal(size=(3, 4, 4))
    found = restored(*rounded(numbers, name))
    assert not found[0].any()
    assert np.abs(found - numbers).max() <= np.abs(numbers).max() / (250 if name == "int8" else 25)
    for bad in (np.nan, np.inf):
        numbers[1, 2, 0, 0] = bad
        assert not np.isfinite(restored(*rounded(numbers, name))[1, 2]).all()
