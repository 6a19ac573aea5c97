"""Train everything that ships, in order: `make train-demo`.

Each stage goes on from its own checkpoint in the work folder; with no checkpoint it starts from the shipped weights,
and with none of those from nothing. The encoder is never trained again once a VAE ships: the UNet knows its latents.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import imagemesh_models
from imagemesh_training import export, train_controlnet, train_text, train_unet, train_vae, train_vit

Stage = tuple[str, Callable[[list[str]], None], list[str]]


def init(folder: Path) -> list[str]:
    """`--init FOLDER` if there is one to start from."""
    return ["--init", str(folder)] if folder.exists() else []


def stages(work: Path, shipped: Path) -> list[Stage]:
    """Name, script and arguments of every stage, in the order they need one another."""
    pipeline, vae = shipped / "emoji-sd", shipped / "emoji-sd" / "vae"
    first = vae if vae.exists() and not (work / "vae").exists() else work / "vae"
    todo: list[Stage] = [] if first == vae else [("vae", train_vae.main, [])]
    return [
        *todo,
        *([] if pipeline.exists() else [("text", train_text.main, ["--vae", str(first)])]),
        ("unet", train_unet.main, ["--vae", str(first), *init(pipeline)]),
        ("vit", train_vit.main, init(shipped / "emoji-vit")),
        ("controlnet", train_controlnet.main, init(shipped / "emoji-controlnet")),
        ("decoder", train_vae.main, ["--decoder-only", "--name", "decoder", "--init", str(first), "--lr", "3e-4"]),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the stages, or those named, then export."""
    parser = argparse.ArgumentParser(description="Train the shipped models")
    parser.add_argument("--work", type=Path, default=Path("out/train"))
    parser.add_argument("--only", nargs="+", help="stages to run: vae text unet vit controlnet decoder")
    parser.add_argument("--steps", type=int, help="of every stage, instead of its own number")
    args = parser.parse_args(argv)
    common = ["--work", str(args.work), *(["--steps", str(args.steps)] if args.steps else [])]
    for name, run, flags in stages(args.work, imagemesh_models.root()):
        if args.only is None or name in args.only:
            print(f"== {name}", flush=True)
            run([*common, *flags])
    export.main(["--work", str(args.work)])


if __name__ == "__main__":
    main()
