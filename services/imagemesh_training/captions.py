"""Words for a scene: short, compositional, and put in as many ways as a newcomer might put them."""

from __future__ import annotations

import numpy as np

from imagemesh_training.data import COLOURS, Scene, things, words_only

PLURAL = {"cherries", "french fries", "fries", "grapes", "pancakes", "glasses", "scissors", "jeans"}
UNCOUNTED = {"bread", "broccoli", "cheese", "fire", "popcorn", "sushi", "pizza"}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge"), "normal": ()}
PLACE_WORDS = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "center": ("in the center", "in the middle", "in the centre"),
}
PREFIXES = ("a picture of", "an emoji of", "a drawing of", "an icon of", "an image of", "a photo of", "picture of")
BACKGROUNDS = (
    "on a {} background",
    "on a {} background",
    "with a {} background",
    "on {}",
    "in front of a {} background",
    "against a {} background",
)


def article(word: str) -> str:
    """The indefinite article that goes before `word`."""
    return "an" if word[0] in "aeio" or word.startswith("um") else "a"


def noun_phrase(words: str, noun: str, rng: np.random.Generator) -> str:
    """`words` is the noun with what stands before it; an article where one belongs, now and then none."""
    if noun in PLURAL:
        return words if rng.random() < 0.7 else f"some {words}"
    if noun in UNCOUNTED and rng.random() < 0.4:
        return words
    return words if rng.random() < 0.12 else f"{article(words)} {words}"


def plain_caption(scene: Scene) -> str:
    """The one caption used for measuring: `a small fox on the left on a blue background`."""
    noun = things()[scene.thing].name
    words = noun if scene.size == "normal" else f"{scene.size} {noun}"
    start = words if noun in PLURAL else f"{article(words)} {words}"
    place = "" if scene.place == "center" else f" {PLACE_WORDS[scene.place][0]}"
    return f"{start}{place} on {article(scene.colour)} {scene.colour} background"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many captions. A white background is often left unsaid, so that a bare `a fox` comes out on white."""
    names = things()[scene.thing].words
    noun = str(names[0] if rng.random() < 0.7 else rng.choice(names))
    size_words = SIZE_WORDS[scene.size]
    words = f"{rng.choice(size_words)} {noun}" if size_words else noun
    subject = noun_phrase(words, noun, rng)
    if rng.random() < 0.25:
        subject = f"{rng.choice(PREFIXES)} {subject}"
    if scene.place != "center" or rng.random() < 0.1:
        subject = f"{subject} {rng.choice(PLACE_WORDS[scene.place])}"
    if rng.random() < (0.5 if scene.colour == "white" else 0.02):
        return subject
    return _with_background(subject, scene.colour, rng)


def _with_background(subject: str, colour: str, rng: np.random.Generator) -> str:
    word = "grey" if colour == "gray" and rng.random() < 0.4 else colour
    kind = rng.random()
    if kind < 0.15:
        return f"{subject}, {word} background"
    if kind < 0.22:
        return f"{word} background, {subject}"
    phrase = str(rng.choice(BACKGROUNDS)).format(word)
    if word == "orange":
        phrase = phrase.replace(" a orange", " an orange")
    return f"{subject} {phrase}"


def vocabulary() -> list[str]:
    """Every word a caption can hold, for the tokenizer."""
    texts = [word for thing in (*things(), *words_only()) for word in thing.words]
    texts += [w for group in (SIZE_WORDS, PLACE_WORDS) for phrases in group.values() for w in phrases]
    texts += [*PREFIXES, *BACKGROUNDS, *COLOURS, "grey", "some", "a", "an", "and", "the", "with", "of"]
    words = {part for text in texts for part in text.replace("-", " - ").replace("{}", "").replace(",", " ").split()}
    return sorted(words | {",", "-"})
