"""Measure the shipped models from the shipped files. `python -m imagemesh_training.evaluate --out DIR`.

Writes `figures.json` and `contact_sheet.png` (48 held-out prompts with what was asked) and prints a table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

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


def figures(models: measures.Models, sprites: data.Sprites) -> dict[str, object]:
    """Every figure of the models there are; `drawn_wrong` lists the prompts the ViT read otherwise."""
    found: dict[str, object] = {"vit": measures.classifier(models, sprites)}
    if models.sd is None:
        return found
    text, wrong = measures.text_to_image(models)
    return {
        **found,
        "text_to_image": text,
        "vae_psnr_db": measures.autoencoder(models, sprites),
        "controlnet": measures.control(models, sprites),
        "img2img": measures.image_to_image(models, sprites),
        "inpainting": measures.inpainting(models, sprites),
        "drawn_wrong": wrong,
    }


def main(argv: list[str] | None = None) -> None:
    """Read the flags, measure, write and print."""
    parser = argparse.ArgumentParser(description="Measure the shipped models")
    parser.add_argument("--models", type=Path, default=imagemesh_models.root(), help="folder of the model folders")
    parser.add_argument("--out", type=Path, default=Path("out/eval"))
    parser.add_argument("--sheet-only", action="store_true")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with torch.no_grad():
        models = measures.Models.load(args.models)
        if models.sd is not None:
            contact_sheet(models).save(args.out / "contact_sheet.png")
        if args.sheet_only:
            return
        found = figures(models, data.load_sprites())
    (args.out / "figures.json").write_text(json.dumps(found, indent=2) + "\n")
    for group, values in found.items():
        if isinstance(values, dict):
            for name, value in values.items():
                print(f"{group:14} {name:28} {value}")
    print(f"{time.monotonic() - start:.0f} s; written to {args.out}")


if __name__ == "__main__":
    main()
