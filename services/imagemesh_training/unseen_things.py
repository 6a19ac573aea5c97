"""Pictures of things that no shipped model was ever shown. `python -m imagemesh_training.unseen_things --out DIR`.

Noto emoji drawn as the shipped models' own things are, at any size and place on any colour, in folders as `imagemesh
finetune` takes them. `make finetune-demo` does both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imagemesh_training import data

# What the figure is of. Settings were chosen with OTHERS alone, so that they don't fit these by luck.
MEASURED = (
    "scorpion", "rooster", "rhinoceros", "lobster", "sloth", "pie", "bento box", "abacus", "axe", "wrench",
    "alarm clock", "compass", "kite", "game die", "bucket", "broom", "chair", "ladder", "toilet", "canoe",
)  # fmt: skip
OTHERS = (
    "otter", "turkey", "beetle", "sauropod", "dodo", "salt", "bagel", "moai", "carpentry saw", "toolbox",
    "hourglass not done", "world map", "yo yo", "chess pawn", "soap", "bathtub", "bed", "parachute", "satellite",
    "tram car",
)  # fmt: skip


def write(names: Sequence[str], root: Path, each: int, seed: int) -> None:
    """``each`` pictures of every thing, a folder a thing."""
    sprites, rng = data.sprites_of(names), np.random.default_rng(seed)
    for number, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            scene = data.Scene(number, str(rng.choice(list(data.COLOURS))), *data.random_layout(rng))
            Image.fromarray(data.draw(scene, sprites, rng)).save(folder / f"{i:03}.png")


def main(argv: list[str] | None = None) -> None:
    """Read the flags, draw and write."""
    parser = argparse.ArgumentParser(description="Draw things that the shipped ViT does not know")
    parser.add_argument("--out", type=Path, default=Path("out/unseen"))
    parser.add_argument("--others", action="store_true", help="other things, to choose settings with")
    parser.add_argument("--each", type=int, default=20, help="pictures of a thing to learn from")
    parser.add_argument("--validate", type=int, default=50, help="to measure with")
    args = parser.parse_args(argv)
    names = OTHERS if args.others else MEASURED
    known = {thing.name for thing in (*data.things(), *data.words_only())}
    assert not known & set(names)
    write(names, args.out / "train", args.each, seed=1)
    write(names, args.out / "validation", args.validate, seed=2)
    print(
        f"{len(names)} things, {args.each} pictures of each to learn from, {args.validate} to measure with: {args.out}"
    )


if __name__ == "__main__":
    main()
