"""Each backend against torch in float32, module by module, on the same work in alternating turns."""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name

import diffusers
import torch

from imagemesh_cli.rooms import SERVICES
from imagemesh_cli.tune_engines import ROLES
from imagemesh_services.measuring import open_engines, time_engines
from tests.bench.harness import Figure

CONTROLNET = "bench-controlnet"
# What is timed.
WORK: Mapping[str, str] = {
    "diffusion": "UNet, an evaluation of two rows",
    "text-encoder": "text encoder, two prompts",
    "vae": "VAE, a picture decoded",
    "controlnet": "ControlNet, a step of two rows",
}


def measure(root: Path, name: str, side: int, rounds: int) -> list[Figure]:
    """Ratios above 1 mean faster than torch; a round of a module takes as long as its forward on each engine."""
    if not (root / CONTROLNET).is_dir():
        torch.manual_seed(1)
        unet = diffusers.UNet2DConditionModel.from_pretrained(root / name / "unet")
        diffusers.ControlNetModel.from_unet(unet).save_pretrained(root / CONTROLNET)
    figures = []
    for role in ROLES:
        figures += _role(role, root, CONTROLNET if role == "controlnet" else name, side, rounds)
    return figures


def _role(role: str, root: Path, name: str, side: int, rounds: int) -> list[Figure]:
    room = SERVICES[role]
    table, trial = (resolve_name(f"{room.package}.{place}") for place in ("backend:BACKENDS", "trial:trial"))
    config = room.config()(models=str(root), device="cpu", graphs=str(root.parent / "graphs"))
    timed = time_engines(open_engines(table, config), name, lambda model: trial(model, side, side), rounds)
    if timed is None:
        raise RuntimeError(f"no engine can do the work of {role}")
    figures = [Figure.of(f"{WORK[role]}: torch", [one * 1e3 for one in timed.seconds["torch"]], "ms")]
    for engine in timed.seconds:
        if engine != "torch":
            figures.append(Figure.of(f"{WORK[role]}: {engine} over torch", timed.ratios(engine), "x"))
    return figures
