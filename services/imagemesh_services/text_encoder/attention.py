"""Attention weights: which words of a prompt count more, written as Stable Diffusion's users write them.

The reading is AUTOMATIC1111's. ``(word)`` counts 1.1 times, ``(word:1.3)`` 1.3 times and ``[word]`` 1 / 1.1 times;
nested ones multiply. A bracket that is not closed reaches to the end; one that closes nothing is text. A backslash
makes the bracket or backslash after it text. ``BREAK``, a word by itself, ends a window.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from imagemesh_runtime.errors import InvalidArgument

MAX_DEPTH: Final = 32
MAX_WEIGHT: Final = 10.0
_ROUND, _SQUARE = 1.1, 1 / 1.1
# Possessive, so that no text is read more than a few times over.
_TOKEN: Final = re.compile(
    r"""\\[()\[\]\\] | [()\[\]\\] | [^()\[\]\\:]+ |
    :\s*+(?P<weight>[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*+\) | :""",
    re.VERBOSE,
)
_BREAK: Final = re.compile(r"\bBREAK\b")
_SIGN: Final = re.compile(r"[()\[\]\\]|\bBREAK\b")
_EXCERPT = 20


@dataclass(frozen=True)
class Piece:
    """Text whose tokens all have one weight; it is tokenized by itself."""

    text: str
    weight: float = 1.0


# What stands between two BREAKs; each begins a window.
Section = tuple[Piece, ...]


def literal(text: str) -> tuple[Section, ...]:
    """The text as it is, with no weights."""
    return ((Piece(text),),)


def is_plain(text: str) -> bool:
    """Whether nothing in the text means more than it says."""
    return _SIGN.search(text) is None


def parse_attention(text: str, field: str) -> tuple[Section, ...]:
    """The text's sections; at least one, and in each at least one piece. Takes time linear in the text.

    Raises:
        InvalidArgument: brackets are nested too deep, or a weight is out of range; ``field`` is the prompt's name.
    """
    pieces: list[list[_Part]] = [[]]
    reader = _Reader(text, field)
    for token in _TOKEN.finditer(text):
        reader.take(token)
    reader.end()
    for part in reader.parts:
        if part.ends_section:
            pieces.append([])
        else:
            pieces[-1].append(part)
    return tuple(_merged(section) for section in pieces)


@dataclass
class _Part:
    text: str
    weight: float = 1.0
    ends_section: bool = False


class _Reader:
    """Reads tokens from left to right; a bracket's weight reaches the parts since it was opened."""

    def __init__(self, text: str, field: str) -> None:
        self.parts: list[_Part] = []
        self._text = text
        self._field = field
        # How many parts there were where each bracket was opened.
        self._open: dict[str, list[int]] = {"(": [], "[": []}

    def take(self, token: "re.Match[str]") -> None:
        found, weight = token.group(), token.group("weight")
        if found[0] == "\\":
            self.parts.append(_Part(found[1:]))
        elif found in self._open:
            check_depth(sum(map(len, self._open.values())), self._text, token.start(), self._field)
            self._open[found].append(len(self.parts))
        elif weight is not None and self._open["("]:
            self._close("(", self._checked(float(weight), token.start()), token.start())
        elif found == ")" and self._open["("]:
            self._close("(", _ROUND, token.start())
        elif found == "]" and self._open["["]:
            self._close("[", _SQUARE, token.start())
        else:
            self._add_text(found)

    def end(self) -> None:
        """Close what was left open."""
        for bracket, weight in (("(", _ROUND), ("[", _SQUARE)):
            while self._open[bracket]:
                self._close(bracket, weight, len(self._text))

    def _close(self, bracket: str, weight: float, at: int) -> None:
        for part in self.parts[self._open[bracket].pop() :]:
            part.weight = self._checked(part.weight * weight, at)

    def _add_text(self, text: str) -> None:
        first, *others = _BREAK.split(text)
        if not others:
            self.parts.append(_Part(text))
            return
        self.parts.append(_Part(first.rstrip()))
        for i, other in enumerate(others):
            last = i == len(others) - 1
            self.parts += [_Part("", ends_section=True), _Part(other.lstrip() if last else other.strip())]

    def _checked(self, weight: float, at: int) -> float:
        if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
            got = f"a weight of {weight:.4g} {where(self._text, at)}"
            raise InvalidArgument(self._field, got, f"a prompt with weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        return weight


def _merged(parts: Sequence[_Part]) -> Section:
    """Neighbours of equal weight as one, so that words cut by brackets of weight 1 are whole again."""
    runs: list[tuple[float, list[str]]] = []
    for part in parts:
        if not runs or runs[-1][0] != part.weight:
            runs.append((part.weight, []))
        runs[-1][1].append(part.text)
    return tuple(Piece("".join(texts), weight) for weight, texts in runs) or (Piece(""),)


def check_depth(depth: int, text: str, at: int, field: str) -> None:
    """Raise InvalidArgument if a bracket at ``at`` would be inside ``depth`` others that are too many."""
    if depth >= MAX_DEPTH:
        got = f"brackets {depth + 1} deep {where(text, at)}"
        raise InvalidArgument(field, got, f"a prompt with brackets at most {MAX_DEPTH} deep")


def where(text: str, at: int) -> str:
    """A position in a prompt for a person: its number, counted from 1, and what stands there."""
    excerpt = text[max(at - _EXCERPT, 0) : at + _EXCERPT]
    return f"at character {at + 1} (near {excerpt!r})"
