"""What the shipped models are trained on: Noto emoji composed over flat backgrounds, and captions for them.

A `Scene` says what is in a picture (thing, background colour, size, place); `draw` turns it into pixels and
`captions.py` into words. Everything random is drawn from the `numpy` generator that the caller hands
in, so a run can be repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import cv2
import emoji
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size the bitmap font has
SPRITE = 128  # sprites are squares of this many pixels
PICTURE = 64  # pictures are squares of this many pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (252, 220, 70),
    "green": (60, 170, 75),
    "blue": (50, 115, 230),
    "purple": (130, 65, 190),
    "pink": (250, 160, 200),
}
SIZES = ("normal", "small", "large")
PLACES = ("center", "left", "right", "top", "bottom")

Pixels = NDArray[np.uint8]
Sprites = NDArray[np.float32]


@dataclass(frozen=True)
class Thing:
    """One class of picture: `name` is its label, `words` all names a caption may use, `emoji` its character."""

    name: str
    words: tuple[str, ...]
    emoji: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `thing` indexes `things()`; the other fields are keys of COLOURS, SIZES and PLACES."""

    thing: int
    colour: str
    size: str = "normal"
    place: str = "center"


def plain(name: str) -> str:
    """An emoji's name as people write it: `:jack-o-lantern:` becomes `jack o lantern`."""
    return name.strip(":").replace("_", " ").replace("-", " ").lower()


WORDS_ONLY = "[words only]"  # the section of things.txt that is in the vocabulary and not drawn


@cache
def things() -> tuple[Thing, ...]:
    """The curated things in file order, which is also the order of the ViT's labels."""
    return tuple(_read(_lists()[0]))


@cache
def words_only() -> tuple[Thing, ...]:
    """What the text encoder was taught to read and the models no longer draw: its words keep their tokens."""
    return tuple(_read(_lists()[1]))


def _lists() -> tuple[str, str]:
    drawn, _, words = (resources.files(__package__) / "things.txt").read_text().partition(f"\n{WORDS_ONLY}\n")
    return drawn, words


@cache
def _characters() -> dict[str, str]:
    """All emoji by their plain names."""
    whole = emoji.STATUS["fully_qualified"]
    return {plain(entry["en"]): c for c, entry in emoji.EMOJI_DATA.items() if entry["status"] <= whole}


def _read(text: str) -> Iterator[Thing]:
    characters = _characters()
    for line in text.splitlines():
        if not line.strip() or line[0] in "#[":
            continue
        name, source, *more = (part.strip() for part in line.split("|"))
        words = tuple(word.strip() for word in more[0].split(",")) if more else ()
        yield Thing(name, (name, *words), characters[source])


def held_out(thing: str, colour: str) -> bool:
    """Whether this pair is kept for measuring: a tenth of all pairs, fixed by a hash so that no run can leak it."""
    digest = hashlib.sha256(f"{thing}/{colour}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 10 == 0


def pairs(*, held: bool) -> list[Scene]:
    """Every (thing, colour) pair of the training set, or of those kept for measuring: at normal size in the middle."""
    names = [thing.name for thing in things()]
    return [Scene(i, colour) for i, name in enumerate(names) for colour in COLOURS if held_out(name, colour) == held]


def load_sprites(cache_dir: Path | None = None) -> Sprites:
    """All things as premultiplied RGBA in 0..1, shape (things, SPRITE, SPRITE, 4), longest side touching the border."""
    path = cache_dir / f"sprites-{len(things())}.npy" if cache_dir else None
    if path and path.exists():
        return np.asarray(np.load(path), dtype=np.float32)
    sprites = _render_all(thing.emoji for thing in things())
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, sprites)
    return sprites


def sprites_of(names: Iterable[str]) -> Sprites:
    """Sprites as `load_sprites` makes them, of any emoji by their plain names in the package `emoji`."""
    return _render_all(_characters()[name] for name in names)


def _render_all(characters: Iterable[str]) -> Sprites:
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    return np.stack([_render(character, font) for character in characters])


def _render(character: str, font: ImageFont.FreeTypeFont) -> Sprites:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no picture of {character!r}")
    ink = np.asarray(canvas.crop(box), dtype=np.float32) / 255
    ink[..., :3] *= ink[..., 3:]
    scale = SPRITE / max(ink.shape[:2])
    ink = cv2.resize(ink, (round(ink.shape[1] * scale), round(ink.shape[0] * scale)), interpolation=cv2.INTER_AREA)
    sprite = np.zeros((SPRITE, SPRITE, 4), np.float32)
    top, left = (SPRITE - ink.shape[0]) // 2, (SPRITE - ink.shape[1]) // 2
    sprite[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return sprite


def box_of(scene: Scene, rng: np.random.Generator | None = None, jitter: int = 2) -> tuple[int, int, int]:
    """Side, left and top in pixels of the square the thing fills; with `rng`, each off by up to `jitter` pixels."""
    centred = scene.place == "center"
    side = {"small": 28, "normal": 48 if centred else 36, "large": 60 if centred else 40}[scene.size]
    shift = (PICTURE - side) // 2 - 2
    dx = {"left": -shift, "right": shift}.get(scene.place, 0)
    dy = {"top": -shift, "bottom": shift}.get(scene.place, 0)
    off = rng.integers(-jitter, jitter + 1, 3) if rng is not None else np.zeros(3, int)
    side = min(side + int(off[0]), PICTURE)
    limit = PICTURE - side
    left = min(max(limit // 2 + dx + int(off[1]), 0), limit)
    top = min(max(limit // 2 + dy + int(off[2]), 0), limit)
    return side, left, top


def paint(sprite: Sprites, background: tuple[int, int, int], box: tuple[int, int, int]) -> Pixels:
    """One sprite over a flat background, antialiased by scaling down: uint8 (PICTURE, PICTURE, 3)."""
    side, left, top = box
    ink = cv2.resize(sprite, (side, side), interpolation=cv2.INTER_AREA)
    picture = np.empty((PICTURE, PICTURE, 3), np.float32)
    picture[:] = np.asarray(background, np.float32) / 255
    under = picture[top : top + side, left : left + side]
    under[:] = under * (1 - ink[..., 3:]) + ink[..., :3]
    return np.asarray((picture * 255).round().clip(0, 255), dtype=np.uint8)


def draw(scene: Scene, sprites: Sprites, rng: np.random.Generator | None = None, jitter: int = 2) -> Pixels:
    """The picture of a scene, uint8 (PICTURE, PICTURE, 3)."""
    return paint(sprites[scene.thing], COLOURS[scene.colour], box_of(scene, rng, jitter))


def random_scene(rng: np.random.Generator, *, held: bool = False) -> Scene:
    """A scene from the training pairs, or with `held` from the pairs kept for measuring."""
    while True:
        thing = int(rng.integers(len(things())))
        colour = str(rng.choice(list(COLOURS)))
        if held_out(things()[thing].name, colour) == held:
            break
    return Scene(thing, colour, *random_layout(rng))


def random_layout(rng: np.random.Generator) -> tuple[str, str]:
    """A size and a place, mostly normal and in the middle."""
    return str(rng.choice(SIZES, p=(0.6, 0.2, 0.2))), str(rng.choice(PLACES, p=(0.6, 0.1, 0.1, 0.1, 0.1)))
