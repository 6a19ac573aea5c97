"""A generation with a ControlNet, whose service and the sampler have a core each, against diffusers' pipeline on one.

The model has SD1.5's four levels at a fraction of its width, random weights. Twice against diffusers: as it is,
embedding the picture in every step, and with that embedding kept, so that only the overlap is left as the difference.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any

import diffusers
import grpc
import numpy as np
import torch

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.tensors import from_proto, to_proto
from tests.bench.harness import Figure, interleave, ratios
from tests.bench.owners import STOP_SECONDS
from tests.support.processes import Process
from tests.support.tiny_models import build_stable_diffusion

NAME, NET = "overlap-sd", "overlap-net"
WIDTHS, SIDE, STEPS, GUIDANCE = (128, 256, 512, 512), 192, 8, 5.0
TOKENS, CONTEXT = 77, 256
PATIENCE = 120.0  # seconds for a generation: far more than one takes


def build(root: Path, widths: tuple[int, ...] = WIDTHS) -> None:
    """Write the model and its ControlNet."""
    build_stable_diffusion(root / NAME)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=widths, cross_attention_dim=CONTEXT, attention_head_dim=8,
        norm_num_groups=min(32, widths[0]),
    )  # fmt: skip
    unet.save_pretrained(root / NAME / "unet")
    net = diffusers.ControlNetModel.from_unet(unet)
    for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(zero.weight, std=0.02)  # an untrained ControlNet's residuals are nothing
    net.save_pretrained(root / NET)


class Inputs:
    """What both arms are asked for."""

    def __init__(self, side: int, steps: int) -> None:
        numbers = np.random.default_rng(0)
        self.side, self.steps = side, steps
        self.picture = numbers.integers(0, 256, (side, side, 3), dtype=np.uint8)
        self.embeds, self.negative = numbers.normal(size=(2, 1, TOKENS, CONTEXT)).astype(np.float32)

    def request(self) -> pb.SampleRequest:
        unit = pb.ControlUnit(model=NET, image=to_proto(self.picture), scale=1.0)
        conditioning = {"prompt_embeds": to_proto(self.embeds), "negative_prompt_embeds": to_proto(self.negative)}
        return pb.SampleRequest(
            model=NAME, conditioning=conditioning, width=self.side, height=self.side, steps=self.steps,
            guidance_scale=GUIDANCE, scheduler="DDIM", seeds=[1], controls=[unit],
        )  # fmt: skip


class Library:
    """diffusers' pipeline in this process, on one core."""

    def __init__(self, root: Path, inputs: Inputs, core: int) -> None:
        self._inputs, self._core = inputs, core
        net = diffusers.ControlNetModel.from_pretrained(root / NET)
        self._pipe: Any = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
            root / NAME, controlnet=net, safety_checker=None
        )
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.scheduler = diffusers.DDIMScheduler.from_config(self._pipe.scheduler.config)

    def draw(self) -> np.ndarray:
        inputs = self._inputs
        with _on(self._core), torch.inference_mode():
            found = self._pipe(
                image=torch.from_numpy(inputs.picture).permute(2, 0, 1)[None] / 255,
                prompt_embeds=torch.from_numpy(inputs.embeds), num_inference_steps=inputs.steps,
                negative_prompt_embeds=torch.from_numpy(inputs.negative), guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(1), output_type="latent",
            ).images  # fmt: skip
        latents: np.ndarray = found.numpy()
        return latents

    def draw_with_hint_kept(self) -> np.ndarray:
        """The same; the picture is embedded in the first step alone."""
        module = self._pipe.controlnet.controlnet_cond_embedding
        embed, kept = module.forward, list[torch.Tensor]()

        def once(conditioning: torch.Tensor) -> torch.Tensor:
            if not kept:
                kept.append(embed(conditioning))
            return kept[0]

        module.forward = once
        try:
            return self.draw()
        finally:
            del module.forward  # what hid the class's


@contextmanager
def _on(core: int) -> Iterator[None]:
    """This thread on one core, and torch on this thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@contextmanager
def service(name: str, address: str, core: int, env: dict[str, str]) -> Iterator[Process]:
    """The service on one core, in a session of its own: siblings of one share a core's time wherever they are."""
    program = [sys.executable, "-m", "tests.support.bound", str(os.getpid()), "imagemesh_cli.main"]
    command = [*program, "serve", name, "--listen", address]
    with _on(core):  # children inherit it
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env}
        child = Popen(command, env=env, stdout=DEVNULL, start_new_session=True)
    try:
        yield Process(name, address, child)
    finally:
        child.terminate()
        try:
            child.wait(timeout=STOP_SECONDS)
        except TimeoutExpired:
            child.kill()
            child.wait()
            raise


@contextmanager
def mesh(root: Path, folder: Path) -> Iterator[rpc.DiffusionServiceStub]:
    """The two services, joined by a Unix socket and shared memory."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError("the services need a core each, and there is one")
    control, sampler = (f"unix:{folder}/{name}.sock" for name in ("controlnet", "diffusion"))
    env = {
        "IMAGEMESH_MODELS": str(root), "IMAGEMESH_THREADS": "1", "IMAGEMESH_DIFFUSION_CONTROLNET": control,
        "IMAGEMESH_METRICS_LISTEN": "127.0.0.1:0", "IMAGEMESH_ADMIN_LISTEN": "127.0.0.1:0",
        "IMAGEMESH_LOG_LEVEL": "ERROR", "IMAGEMESH_DRAIN_GRACE_SECONDS": "5",
    }  # fmt: skip
    with ExitStack() as stack:
        begun = [
            stack.enter_context(service("controlnet", control, cores[1], env)),
            stack.enter_context(service("diffusion", sampler, cores[0], env)),
        ]
        for one in begun:
            one.wait_ready()
        yield rpc.DiffusionServiceStub(stack.enter_context(grpc.insecure_channel(sampler)))


def measure(rounds: int, widths: tuple[int, ...] = WIDTHS, side: int = SIDE, steps: int = STEPS) -> list[Figure]:
    """Seconds of a generation from the prompts' embeddings to the latents, and how much sooner the mesh is done."""
    inputs = Inputs(side, steps)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "models")
        build(root, widths)
        library = Library(root, inputs, min(os.sched_getaffinity(0)))
        with mesh(root, Path(folder)) as stub:

            def ours() -> np.ndarray:
                last = list(stub.Sample(inputs.request(), timeout=PATIENCE))[-1]
                return from_proto(last.result.outputs["latents"], "latents")

            draws = {"diffusers": library.draw, "diffusers, hint kept": library.draw_with_hint_kept, "mesh": ours}
            drawn: dict[str, np.ndarray] = {}
            arms = {arm: partial(_keep, drawn, arm, draw) for arm, draw in draws.items()}
            seconds = interleave(arms, rounds)
            _require_same(*drawn.values())
    what = f"ControlNet, {side}x{side}, {steps} steps"
    compared = (("diffusers", ">= 1.3"), ("diffusers, hint kept", ">= 1.2"))
    return [
        *(Figure.of(f"{what}: {arm}", taken, "s") for arm, taken in seconds.items()),
        *(Figure.of(f"{what}: {over} / mesh", ratios(seconds, over, "mesh"), "x", goal) for over, goal in compared),
    ]


def _keep(drawn: dict[str, np.ndarray], arm: str, draw: Callable[[], np.ndarray]) -> None:
    drawn[arm] = draw()


def _require_same(*latents: np.ndarray) -> None:
    """All arms draw the same.

    Raises:
        RuntimeError: they do not.
    """
    worst = max(float(np.abs(one - latents[0]).max()) for one in latents[1:])
    if not worst < 1e-2:
        raise RuntimeError(f"the arms' latents differ by {worst}")
