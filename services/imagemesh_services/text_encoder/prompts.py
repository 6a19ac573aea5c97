"""What a request's prompts mean: the texts that are encoded, and which of them each step has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.text_encoder.attention import literal, parse_attention
from imagemesh_services.text_encoder.backend import TextModel, Tokens
from imagemesh_services.text_encoder.schedule import Course, is_scheduled, parse_schedule, phases


@dataclass(frozen=True)
class Prompt:
    """A prompt's texts, one a phase.

    Attributes:
        field: its name in the request.
        rows: the text of each step; None: there is but one.
        scheduled: whether it is made of steps.
    """

    field: str
    texts: Sequence[str]
    rows: Sequence[int] | None = None
    scheduled: bool = False


def read_prompt(field: str, text: str, course: Course) -> Prompt:
    """The prompt with its schedules resolved.

    Raises:
        InvalidArgument: brackets are nested too deep, there are too many phases, or the steps aren't known.
    """
    nodes = parse_schedule(text, field)
    if not is_scheduled(nodes):
        return Prompt(field, [text])
    if not course.steps:
        raise InvalidArgument("steps", course.steps, f"at least 1, since {field} changes from step to step")
    found = phases(nodes, course, field)
    return Prompt(field, found.texts, found.rows if len(found.texts) > 1 else None, scheduled=True)


def tokenize(model: TextModel, field: str, text: str, *, as_is: bool) -> Tokens:
    """The text's tokens with their weights.

    Raises:
        InvalidArgument: brackets are nested too deep, a weight is out of range, or an embedding can't be used.
    """
    for word, why in model.unusable.items():
        if word in text and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
            raise InvalidArgument(field, f"the embedding {word!r}", f"a prompt without it: {why}")
    sections = literal(text) if as_is else parse_attention(text, field)
    return model.tokenize(text) if sections == literal(text) else model.tokenize_weighted(sections)
