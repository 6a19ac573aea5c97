"""Content negotiation as RFC 9110, section 12.5.1, has it."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# token "/" token or "*", then parameters, of which only the weight counts.
_RANGE = re.compile(r"\s*([\w!#$%&'*+.^`|~-]+)/([\w!#$%&'*+.^`|~-]+)\s*(;.*)?", re.ASCII | re.DOTALL)
_WEIGHT = re.compile(r";\s*q\s*=([^;]*)", re.IGNORECASE)
_NUMBER = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


class _Range(NamedTuple):
    """One element of the header."""

    kind: str
    subtype: str
    weight: float

    def specificity(self, media: str) -> int:
        """0: it doesn't match ``media``; else larger for a closer match."""
        kind, _, subtype = media.partition("/")
        if (self.kind, self.subtype) == (kind, subtype):
            return 3
        if (self.kind, self.subtype) == (kind, "*"):
            return 2
        return int((self.kind, self.subtype) == ("*", "*"))


def choose(header: str, offered: Sequence[str]) -> str | None:
    """The media type of ``offered`` that the ``Accept`` header likes best; None: it likes none of them.

    The most specific range that matches a type gives its weight. Among equals, the one that was named more specifically
    wins, then the one that was named first, then the first one offered. An empty header accepts everything.
    """
    if not header.strip():
        return offered[0]
    ranges = list(_parse(header))
    best: tuple[float, int, int] | None = None
    chosen = None
    for media in offered:
        matches = [(one.specificity(media), -place, one.weight) for place, one in enumerate(ranges)]
        specificity, place, weight = max(matches, default=(0, 0, 0.0))
        rank = (weight, specificity, place)
        if specificity and weight > 0 and (best is None or rank > best):
            best, chosen = rank, media
    return chosen


def _parse(header: str) -> Iterator[_Range]:
    """The ranges of the header; what is none, or has a weight that is none, is passed over."""
    for element in header.split(","):
        match = _RANGE.fullmatch(element)
        if match is None:
            continue
        weights = _WEIGHT.findall(match[3] or "")
        weight = weights[0].strip() if weights else "1"
        if _NUMBER.fullmatch(weight):
            yield _Range(match[1].lower(), match[2].lower(), float(weight))
