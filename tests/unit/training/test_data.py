"""What the training pictures and captions promise."""

import numpy as np
import pytest

from imagemesh_training import data, edges
from imagemesh_training.captions import caption, plain_caption
from imagemesh_training.data import COLOURS, Scene, held_out, things
from imagemesh_training.measures import colour_of

NAMES = [thing.name for thing in things()]
PINNED = [("bat", "red"), ("bat", "green"), ("bear", "gray"), ("cat", "white")]


@pytest.fixture(scope="module")
def square() -> data.Sprites:
    """One sprite for every thing: an opaque brown square that fills the middle half of its box."""
    sprite = np.zeros((data.SPRITE, data.SPRITE, 4), np.float32)
    sprite[32:96, 32:96] = (0.5, 0.3, 0.1, 1.0)
    return np.repeat(sprite[None], len(NAMES), axis=0)


def ink(picture: data.Pixels, colour: str) -> np.ndarray:
    """Rows and columns of the pixels that aren't background."""
    return np.argwhere((picture != COLOURS[colour]).any(axis=-1))


@pytest.mark.parametrize("colour", COLOURS)
def test_background_is_the_named_colour(square: data.Sprites, colour: str) -> None:
    picture = data.draw(Scene(3, colour), square)
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[0, 0]) == tuple(picture[-1, -1]) == COLOURS[colour]
    assert colour_of(picture) == colour


def test_place_and_size_are_where_and_how_big_the_thing_is_drawn(square: data.Sprites) -> None:
    def drawn(size: str = "normal", place: str = "center") -> np.ndarray:
        return ink(data.draw(Scene(0, "white", size, place), square), "white")

    (middle_y, middle_x) = drawn().mean(axis=0)
    assert drawn(place="left").mean(axis=0)[1] < middle_x - 8
    assert drawn(place="right").mean(axis=0)[1] > middle_x + 8
    assert drawn(place="top").mean(axis=0)[0] < middle_y - 8
    assert drawn(place="bottom").mean(axis=0)[0] > middle_y + 8
    assert len(drawn("small")) < len(drawn("normal")) < len(drawn("large"))


def test_a_thing_never_leaves_the_picture(square: data.Sprites) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        side, left, top = data.box_of(data.random_scene(rng), rng)
        assert left >= 0
        assert top >= 0
        assert max(left, top) + side <= data.PICTURE


def test_training_scenes_and_held_out_scenes_share_no_pair() -> None:
    rng = np.random.default_rng(0)
    seen = {(s.thing, s.colour) for s in (data.random_scene(rng) for _ in range(2000))}
    kept = {(s.thing, s.colour) for s in (data.random_scene(rng, held=True) for _ in range(500))}
    assert not seen & kept


def test_the_held_out_tenth_is_always_the_same() -> None:
    pairs = [(name, colour) for name in NAMES for colour in COLOURS if held_out(name, colour)]
    assert 0.08 < len(pairs) / (len(NAMES) * len(COLOURS)) < 0.12
    assert pairs[:4] == PINNED


def test_the_font_has_every_thing_and_no_two_are_alike() -> None:
    sprites = data.load_sprites()
    assert sprites.shape == (len(NAMES), data.SPRITE, data.SPRITE, 4)
    assert (sprites[..., 3].mean(axis=(1, 2)) > 0.05).all()
    assert len({sprite.tobytes() for sprite in sprites}) == len(NAMES)


def test_names_are_unique_whatever_word_is_used() -> None:
    words = [word for thing in things() for word in thing.words]
    assert len(words) == len(set(words))


def test_a_caption_says_what_the_scene_shows() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        scene = data.random_scene(rng)
        text = caption(scene, rng)
        assert any(word in text for word in things()[scene.thing].words)
        assert any(word in text.split() for word in ("small", "tiny", "little")) == (scene.size == "small")
        assert ("left" in text) == (scene.place == "left")
        others = set(COLOURS) - {scene.colour, "orange", "red"}  # an orange and a red heart are things
        assert not others & set(text.replace(",", "").split())


def test_the_plain_caption_is_plain_english() -> None:
    cat, umbrella = NAMES.index("cat"), NAMES.index("umbrella")
    assert plain_caption(Scene(cat, "red")) == "a cat on a red background"
    assert plain_caption(Scene(umbrella, "orange")) == "an umbrella on an orange background"
    assert plain_caption(Scene(cat, "blue", "small", "left")) == "a small cat on the left on a blue background"


def test_overlap_is_one_for_the_same_edges_and_zero_for_far_ones() -> None:
    a, b = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    a[10], b[50] = 255, 255
    assert edges.overlap(a, a) == 1.0
    assert edges.overlap(a, np.roll(a, 2, axis=0)) == 1.0
    assert edges.overlap(a, b) == 0.0
    assert edges.overlap(a, a | b) == 0.5
