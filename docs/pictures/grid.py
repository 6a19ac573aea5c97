"""Draw grid.png anew through a running mesh: ``python docs/pictures/grid.py``."""

import os
from pathlib import Path

from PIL import Image, ImageDraw

from imagemesh_client import Client

THINGS = ("apple", "fox", "pizza", "rocket", "frog", "house", "ghost", "umbrella")
COLOURS = ("blue", "green", "yellow")
SIDE, LABEL = 128, 16


def main() -> None:
    """One picture a prompt, none chosen by its looks; the prompt stands below it."""
    sheet = Image.new("RGB", (len(THINGS) * (SIDE + 4), len(COLOURS) * (SIDE + LABEL + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    with Client(os.environ.get("IMAGEMESH_SERVER", "127.0.0.1:50050")) as mesh:
        for column, thing in enumerate(THINGS):
            for row, colour in enumerate(COLOURS):
                drawn = mesh.generate(f"a {thing} on a {colour} background", seed=column).images[0].to_pil()
                x, y = column * (SIDE + 4), row * (SIDE + LABEL + 4)
                sheet.paste(drawn.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, y))
                pen.text((x + 2, y + SIDE + 2), f"{thing}, {colour}", fill="black")
    sheet.save(Path(__file__).with_name("grid.png"))


if __name__ == "__main__":
    main()
