"""Prompts that change from step to step, written as Stable Diffusion's users write them.

``[a:b:0.5]`` is a in the first half of the steps and b in the second, ``[a:b:10]`` a in ten steps and then b;
``[a::0.5]`` leaves a out then, ``[b:0.5]`` and ``[:b:0.5]`` put b in. ``[a|b]`` takes turns, a step each. They nest.
A number with a point is a part of the steps, one without a number of steps, rounded down.

Steps are those of the whole schedule, as the user counts them: image to image begins in their midst. In a second pass
the numbers go on: its steps follow those of the first, and 1.5 is half of the second; turns begin anew.

What stands in brackets and is no schedule is handed on as it is, for ``attention`` to read.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.text_encoder.attention import check_depth

MAX_PHASES: Final = 64
_TOKEN: Final = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_NUMBER: Final = re.compile(r"\s*+([+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*+")
_PAIRS: Final = {"]": "[", ")": "("}


@dataclass(frozen=True)
class Switch:
    """``before`` until ``when``, then ``after``."""

    before: Sequence["str | Switch | Cycle"]
    after: Sequence["str | Switch | Cycle"]
    when: float
    # Whether ``when`` is a part of the steps, and not a number of them.
    part: bool


@dataclass(frozen=True)
class Cycle:
    """One option a step, in turn."""

    options: Sequence[Sequence["str | Switch | Cycle"]]


Nodes = Sequence[str | Switch | Cycle]


@dataclass(frozen=True)
class Course:
    """The steps that a prompt is for.

    Attributes:
        steps: of the whole schedule.
        prior: steps of the pass before; 0: this is the first.
    """

    steps: int
    prior: int = 0

    def switch_step(self, switch: Switch) -> int:
        """How many steps of this pass come before the switch."""
        first = switch.when - (1 if self.prior else 0) if switch.part else switch.when - self.prior
        return int(max(min(first * self.steps if switch.part else first, self.steps), 0))


@dataclass(frozen=True)
class Phases:
    """The texts that a prompt goes through, and which of them each step has."""

    texts: Sequence[str]
    rows: Sequence[int]


def parse_schedule(text: str, field: str) -> Nodes:
    """The prompt as a tree; a plain text is one string, and an empty one none. Takes time linear in the text.

    Raises:
        InvalidArgument: brackets are nested too deep; ``field`` is the prompt's name.
    """
    return _Builder(text, field).nodes()


def is_scheduled(nodes: Nodes) -> bool:
    """Whether the prompt differs from step to step, or could in a pass of other steps."""
    return any(not isinstance(node, str) for node in nodes)


def phases(nodes: Nodes, course: Course, field: str) -> Phases:
    """What the prompt is at each step.

    Raises:
        InvalidArgument: it has too many phases; ``field`` is the prompt's name.
    """
    switches = sorted({course.switch_step(node) for node in _walk(nodes) if isinstance(node, Switch)})
    cycles = sorted({len(node.options) for node in _walk(nodes) if isinstance(node, Cycle)})
    seen: dict[tuple[int, ...], int] = {}
    texts: dict[str, int] = {}
    rows: list[int] = []
    for step in range(course.steps):
        state = (bisect_right(switches, step), *(step % length for length in cycles))
        if state not in seen:
            if len(seen) == MAX_PHASES:
                got = f"a prompt whose phases are more by step {step + 1} of {course.steps}"
                raise InvalidArgument(field, got, f"a prompt of at most {MAX_PHASES} phases")
            seen[state] = texts.setdefault(_text(nodes, step, course), len(texts))
        rows.append(seen[state])
    return Phases(list(texts), rows)


def _walk(nodes: Nodes) -> Iterator[Switch | Cycle]:
    todo: list[Nodes] = [nodes]
    while todo:
        for node in todo.pop():
            if isinstance(node, str):
                continue
            yield node
            todo += node.options if isinstance(node, Cycle) else (node.before, node.after)


def _add_texts(texts: list[str], nodes: Nodes, step: int, course: Course) -> None:
    for node in nodes:
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, Switch):
            _add_texts(texts, node.before if step < course.switch_step(node) else node.after, step, course)
        else:
            _add_texts(texts, node.options[step % len(node.options)], step, course)


def _text(nodes: Nodes, step: int, course: Course) -> str:
    texts: list[str] = []
    _add_texts(texts, nodes, step, course)
    return "".join(texts)


class _Builder:
    """First pairs the brackets, then reads what they hold; each token is read once a pass."""

    def __init__(self, text: str, field: str) -> None:
        self._tokens: list[str] = []
        self._closes: dict[int, int] = {}  # by where the bracket is opened
        stack: list[int] = []
        count = {"[": 0, "(": 0}
        for i, found in enumerate(_TOKEN.finditer(text)):
            token = found.group()
            self._tokens.append(token)
            if token in count:
                check_depth(len(stack), text, found.start(), field)
                stack.append(i)
                count[token] += 1
            elif count.get(_PAIRS.get(token, ""), 0):
                # Brackets of the other kind that were opened since are text.
                while self._tokens[stack[-1]] != _PAIRS[token]:
                    count[self._tokens[stack.pop()]] -= 1
                count[self._tokens[stack[-1]]] -= 1
                self._closes[stack.pop()] = i

    def nodes(self) -> Nodes:
        return self._read(0, len(self._tokens))

    def _read(self, begin: int, end: int) -> Nodes:
        found: list[str | Switch | Cycle] = []
        for i, close in self._top(begin, end):
            if close is None:
                found.append(self._tokens[i])
            elif self._tokens[i] == "[":
                found += self._square(i + 1, close)
            else:
                found += ["(", *self._read(i + 1, close), ")"]
        return _joined(found)

    def _top(self, begin: int, end: int) -> Iterator[tuple[int, int | None]]:
        """The tokens that are in no brackets, and the brackets by where they begin and end."""
        i = begin
        while i < end:
            close = self._closes.get(i)
            yield i, close
            i = i + 1 if close is None else close + 1

    def _square(self, begin: int, end: int) -> Nodes:
        top = [i for i, close in self._top(begin, end) if close is None]
        bars = [i for i in top if self._tokens[i] == "|"]
        if bars:
            edges = [begin - 1, *bars, end]
            return [Cycle([self._read(a + 1, b) for a, b in pairwise(edges)])]
        colons = [i for i in top if self._tokens[i] == ":"]
        number = _NUMBER.fullmatch(self._tokens[end - 1])
        if number is None or len(colons) not in (1, 2) or colons[-1] != end - 2:
            return ["[", *self._read(begin, end), "]"]
        when = number.group(1)
        before = self._read(begin, colons[0]) if len(colons) == 2 else []
        after = self._read(colons[-2] + 1 if len(colons) == 2 else begin, colons[-1])
        return [Switch(before, after, float(when), "." in when)]


def _joined(nodes: Nodes) -> Nodes:
    """Neighbouring texts as one."""
    joined: list[str | Switch | Cycle] = []
    texts: list[str] = []
    for node in [*nodes, None]:
        if isinstance(node, str):
            texts.append(node)
            continue
        if texts:
            joined.append("".join(texts))
            texts = []
        if node is not None:
            joined.append(node)
    return joined
