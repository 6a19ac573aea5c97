"""Write the trained models as imagemesh ships them: half-precision safetensors in the standard folder layouts.

`python -m imagemesh_training.export --work DIR` takes what is there: the pipeline `sd`, a VAE whose decoder was tuned
afterwards (`decoder`), the `vit`, the `controlnet`. Model cards are written by hand and left alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline
from transformers import ViTForImageClassification

import imagemesh_models
from imagemesh_training import tokenizer
from imagemesh_training.train_vit import processor

LIMIT = 48 * 2**20  # bytes, all models together


def settle(folder: Path) -> None:
    """Make a written folder fit to ship.

    transformers is told to load its weights in float32, as diffusers does by itself, though they are stored in half;
    paths of the machine that trained them go; everyone may read the files.
    """
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        if path.name == "config.json" and "dtype" in settings:
            settings["dtype"] = "float32"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def export_pipeline(work: Path, folder: Path) -> None:
    """The text-to-picture folder; the tokenizer both in CLIP's own files and in the one newer libraries write.

    Schedulers that would by default clip what they predict to -1..1, as DDIM does, are told that latents go further.
    """
    pipe = StableDiffusionPipeline.from_pretrained(work / "sd", dtype=torch.float16)
    if (work / "decoder").exists():
        pipe.register_modules(vae=AutoencoderKL.from_pretrained(work / "decoder", dtype=torch.float16))
    pipe.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, folder / "tokenizer" / name)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"clip_sample": False}))
    settle(folder)


def export_vit(work: Path, folder: Path) -> None:
    """The classifier with its labels and its image processor."""
    ViTForImageClassification.from_pretrained(work / "vit", dtype=torch.float16).save_pretrained(folder)
    processor().save_pretrained(folder)
    settle(folder)


def export_controlnet(work: Path, folder: Path) -> None:
    """The ControlNet for the pipeline's UNet."""
    ControlNetModel.from_pretrained(work / "controlnet", dtype=torch.float16).save_pretrained(folder)
    settle(folder)


def main(argv: list[str] | None = None) -> None:
    """Export every model that has been trained; refuse to ship more than the limit."""
    parser = argparse.ArgumentParser(description="Export the trained models")
    parser.add_argument("--work", type=Path, default=Path("out/train"))
    parser.add_argument("--out", type=Path, default=imagemesh_models.root())
    args = parser.parse_args(argv)
    writers = {"sd": export_pipeline, "vit": export_vit, "controlnet": export_controlnet}
    for name, write in writers.items():
        if (args.work / name).exists():
            if name == "sd" and not (args.work / "tokenizer").exists():
                tokenizer.build(args.work / "tokenizer")
            write(args.work, args.out / f"emoji-{name}")
    size = sum(
        path.stat().st_size for path in args.out.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    print(f"{size / 2**20:.1f} MB in {args.out}")
    if size > LIMIT:
        raise SystemExit(f"more than the {LIMIT / 2**20:.0f} MB that may ship")


if __name__ == "__main__":
    main()
