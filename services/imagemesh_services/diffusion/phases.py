"""Prompts that change with the step: which rows of the conditioning hold when."""

from collections.abc import Mapping
from typing import Final

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array

# Of the prompt and of the negative one: int32 [steps], the row that holds at each step of the whole schedule.
PHASES: Final = ("prompt_phases", "negative_prompt_phases")
# A row of the prompt's embeddings and summary, and one of the negative prompt's.
Phase = tuple[int, int]


def phases_of(name: str) -> str:
    """Which of ``PHASES`` tells the rows of the embeddings or summaries called ``name``."""
    return PHASES[name.startswith("negative_")]


def phase_at(conditioning: Mapping[str, Array], step: int) -> Phase:
    """What holds at a step of the whole schedule, from 0."""
    prompt, negative = (int(conditioning[name][step]) if name in conditioning else 0 for name in PHASES)
    return prompt, negative


def told_in(conditioning: Mapping[str, Array], phase: Phase) -> dict[str, Array]:
    """The embeddings and summaries of a phase alone, a row each."""
    rows = dict(zip(PHASES, phase, strict=True))
    return {
        name: array[rows[phases_of(name)] : rows[phases_of(name)] + 1]
        for name, array in conditioning.items()
        if name not in PHASES
    }


def check_rows(field: str, phases: Array, rows: int) -> None:
    """Raise InvalidArgument if the phases name rows that aren't there."""
    if not 0 <= phases.min() <= phases.max() < rows:
        raise InvalidArgument(field, f"rows {phases.min()} to {phases.max()}", f"rows 0 to {rows - 1}")
