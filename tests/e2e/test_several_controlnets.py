"""One, two and three ControlNets against diffusers' pipelines, over each of the ways that residuals go."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imagemesh_client import Client, Control
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.service import create
from tests.support.mesh import event_loop, running_mesh
from tests.support.reference import draw, pipeline, worst
from tests.support.services import serving
from tests.support.steering import moved

PROMPT, STEPS = "the red cat", 4
NAMES = ("tiny-controlnet", "another", "tiny-controlnet")
SCALES = (0.7, 0.4, 1.2)
PARTS = ((0.0, 1.0), (0.25, 1.0), (0.0, 0.6))
PICTURES = [Image.fromarray(one) for one in np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)]
MEMORY = str(64 << 20)
# Where the ControlNet service listens, how much memory is shared, and which counter proves the way.
WAYS = {
    "tcp": ("127.0.0.1:0", "0", "raw"),
    "unix": ("unix:{}/c.sock", "0", "raw"),
    "shm": ("unix:{}/c.sock", MEMORY, "shm"),
}


@pytest.fixture(scope="module")
def repository(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and another ControlNet beside them."""
    root = tmp_path_factory.mktemp("repository")
    for model in models.iterdir():
        os.symlink(model, root / model.name)
    net = diffusers.ControlNetModel.from_pretrained(models / "tiny-controlnet")
    with torch.no_grad():
        for part in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding):
            for weights in part.parameters():
                weights.copy_(weights.flip(0))
    net.save_pretrained(root / "another")
    return root


@pytest.fixture(scope="module", params=WAYS)
def client(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: Any) -> Iterator[Client]:
    """A mesh whose sampler reaches its ControlNets in one of the ways."""
    listen, memory, path = WAYS[request.param]
    shared = {"models": str(repository), "backend": "torch"}
    config = ControlNetConfig(
        listen=listen.format(tmp_path_factory.mktemp("c")), shared_memory_bytes=int(memory), device="cpu", threads=1,
        drain_grace_seconds=0.1, **shared,
    )  # fmt: skip
    with event_loop() as loop, pytest.MonkeyPatch.context() as patch:
        service = serving(create, config)
        served = loop.run(service.__aenter__())
        patch.setenv("IMAGEMESH_CONTROLNET", served.server.address)
        try:
            with (
                running_mesh(without=["controlnet"], shared_memory_bytes=memory, **shared) as mesh,
                Client(mesh.grpc_address) as client,
            ):
                yield client
                ways = {way for way in moved(mesh.services["diffusion"].metrics) if way.endswith("received")}
                assert f"{path} received" in ways
                assert ("shm received" in ways) == (path == "shm")
        finally:
            loop.run(service.__aexit__(None, None, None))


def units(count: int, guess: bool, parts: bool) -> list[Control]:
    return [
        Control(PICTURES[i], NAMES[i], SCALES[i], *(PARTS[i] if parts else (0.0, 1.0)), guess_mode=guess)
        for i in range(count)
    ]


@cache
def reference(repository: Path, count: int, guess: bool, parts: bool) -> np.ndarray:
    pipe = pipeline(repository / "tiny-sd")
    nets = [diffusers.ControlNetModel.from_pretrained(repository / name) for name in NAMES[:count]]
    steered = diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=nets, requires_safety_checker=False
    )
    steered.set_progress_bar_config(disable=True)
    more = {}
    if parts:
        more = {"control_guidance_start": [one for one, _ in PARTS[:count]]}
        more["control_guidance_end"] = [one for _, one in PARTS[:count]]
    steered.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    images = steered(
        PROMPT, image=PICTURES[:count], num_inference_steps=STEPS, guidance_scale=5.0, guess_mode=guess,
        controlnet_conditioning_scale=list(SCALES[:count]), generator=torch.Generator("cpu").manual_seed(3),
        output_type="np", **more,
    ).images  # fmt: skip
    drawn: np.ndarray = (images * 255).round().astype("uint8")
    return drawn[0]


def made(client: Client, controls: list[Control], **more: Any) -> np.ndarray:
    options = {"steps": STEPS, "guidance": 5.0, "seed": 3, "scheduler": "DDIM", **more}
    return np.asarray(client.generate(PROMPT, controls=controls, **options).images[0].to_pil())


@pytest.mark.parametrize("parts", [False, True], ids=["throughout", "in parts"])
@pytest.mark.parametrize("guess", [False, True], ids=["balanced", "guess"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_controlnets_equal_the_librarys(client: Client, repository: Path, count: int, guess: bool, parts: bool) -> None:
    theirs = reference(repository, count, guess, parts)
    ours = made(client, units(count, guess, parts))
    assert worst(ours, theirs) <= 1


@pytest.mark.parametrize("client", ["shm"], indirect=True)
def test_every_knob_tells(client: Client, repository: Path) -> None:
    plain = made(client, [Control(PICTURES[0], "tiny-controlnet")])
    knobs = {"start": 0.5, "end": 0.5, "guess_mode": True, "block_weights": (0, 0, 1, 1, 1), "model": "another"}
    for name, value in knobs.items():
        assert worst(plain, made(client, [Control(PICTURES[0], **{"model": "tiny-controlnet", name: value})])) > 3, name
    ones = Control(PICTURES[0], "tiny-controlnet", block_weights=(1,) * 5)
    np.testing.assert_array_equal(made(client, [ones]), plain)


@pytest.mark.parametrize("client", ["shm"], indirect=True)
def test_outside_its_part_a_controlnet_changes_nothing(client: Client, repository: Path) -> None:
    """An interval between two evaluations holds none."""
    idle = Control(PICTURES[0], "tiny-controlnet", start=0.3, end=0.4)
    theirs = draw(
        repository / "tiny-sd", PROMPT, scheduler_name="DDIM", seeds=[3], num_inference_steps=STEPS, guidance_scale=5.0
    )
    assert worst(made(client, [idle]), theirs[0]) <= 1
