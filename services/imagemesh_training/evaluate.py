"""Measure the shipped models from the shipped files. `python -m imagemesh_training.evaluate --out DIR`.

Writes `figures.json` and `contact_sheet.png` (48 held-out prompts with what was asked) and prints a table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import imagemesh_models
from imagemesh_training import data, measures
from imagemesh_training.captions import plain_caption
from imagemesh_training.data import Pixels

COLUMNS, ROWS, ZOOM, LABEL = 8, 6, 2, 18


def sheet(pictures: list[Pixels], labels: list[str], columns: int = COLUMNS) -> Image.Image:
    """Pictures in rows, each `ZOOM` times its size, with its label under it."""
    side = data.PICTURE * ZOOM
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (side + 6), rows * (side + LABEL + 6)), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(10)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = i % columns * (side + 6) + 3, i // columns * (side + LABEL + 6) + 3
        whole.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        pen.text((x, y + side + 2), label, fill="black", font=font)
    return whole


def contact_sheet(models: measures.Models, seed: int = 48) -> Image.Image:
    """48 held-out prompts of any size and place, picked by chance, not by looks."""
    rng = np.random.default_rng(seed)
    scenes = [data.random_scene(rng, held=True) for _ in range(COLUMNS * ROWS)]
    pictures = measures.generate(models.pipe, [plain_caption(scene) for scene in scenes], seed=seed)
    labels = []
    for scene in scenes:
        extra = [word for word in (scene.size, scene.place) if word not in ("normal", "center")]
        labels.append(" ".join([data.things()[scene.thing].name, "/", scene.colour, *extra]))
    return sheet(pictures, labels)


Group = Callable[[measures.Models, data.Sprites], dict[str, Any]]
GROUPS: dict[str, Group] = {
    "vit": measures.classifier,
    "text_to_image": lambda models, _: measures.text_to_image(models),
    "vae_psnr_db": measures.autoencoder,
    "controlnet": measures.control,
    "img2img": measures.image_to_image,
    "inpainting": measures.inpainting,
}
SHEET = "sheet"


def write(path: Path, name: str, found: dict[str, Any]) -> None:
    """Put one group's figures into the file, print them, and leave the others as they are."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**whole, name: found}, indent=2) + "\n")
    for key, value in found.items():
        if isinstance(value, list):
            print(f"{name:14} {key}:", *value, sep="\n    ", flush=True)
        else:
            print(f"{name:14} {key:28} {value}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Read the flags; measure, write and print a group at a time."""
    parser = argparse.ArgumentParser(description="Measure the shipped models")
    parser.add_argument("--models", type=Path, default=imagemesh_models.root(), help="folder of the model folders")
    parser.add_argument("--out", type=Path, default=Path("out/eval"))
    parser.add_argument("--only", nargs="+", choices=(SHEET, *GROUPS), default=(SHEET, *GROUPS))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    sprites = data.load_sprites()
    with torch.no_grad():
        models = measures.Models.load(args.models)
        if SHEET in args.only and models.sd is not None:
            contact_sheet(models).save(args.out / "contact_sheet.png")
        for name, measure in GROUPS.items():
            if name in args.only and (models.sd is not None or name == "vit"):
                write(args.out / "figures.json", name, measure(models, sprites))
    print(f"{time.monotonic() - start:.0f} s; written to {args.out}")


if __name__ == "__main__":
    main()
