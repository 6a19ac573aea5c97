"""What stands in a picture's "parameters" chunk, read: the prompts, and the fields by their names there."""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

# Matched from field to field in a short line: searched for in a long one, it takes the cube of its length.
_FIELD = re.compile(r'([\w ][\w \-/]{0,60}?):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_MAX: Final = 100_000  # characters
_MAX_LINE: Final = 8192
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def read_infotext(text: str) -> dict[str, str]:
    """``Prompt``, ``Negative prompt``, and the fields of the last line; what can't be read is left out."""
    lines = text[:_MAX].strip().split("\n")
    found = list(_fields_of(lines[-1]))
    fields = dict(found) if len(found) >= 3 else {}
    if fields:
        lines.pop()
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    key = "Prompt"
    for line in lines:
        said = line
        if key == "Prompt" and line.startswith("Negative prompt:"):
            key, said = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        prompts[key].append(said)
    told = {name: "\n".join(one) for name, one in prompts.items()}
    return told | {name: _unquoted(value.strip()) for name, value in fields.items()}


def _fields_of(line: str) -> Iterator[tuple[str, str]]:
    """Names and values, in order; of a line longer than any that is written, those in its first part."""
    if len(line) > _MAX_LINE:
        line = line[:_MAX_LINE].rpartition(",")[0]
    place = 0
    while place < len(line):
        match = _FIELD.match(line, place)
        if match is None:  # no field stands here: the next one begins behind a comma
            place = (line.find(",", place) + 1) or len(line)
        else:
            yield match[1].strip(), match[2]
            place = match.end()


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value


def request_fields(told: dict[str, str]) -> dict[str, Any]:
    """The fields of ``txt2img`` that an infotext stands for."""
    fields: dict[str, Any] = {"prompt": told["Prompt"], "negative_prompt": told["Negative prompt"]}
    for name, (field, kind) in _FIELDS.items():
        if name in told:
            fields[field] = _number(told[name], kind)
    if size := _SIZE.fullmatch(told.get("Size", "")):
        fields |= {"width": int(size[1]), "height": int(size[2])}
    if size := _SIZE.fullmatch(told.get("Hires resize", "")):
        fields |= {"enable_hr": True, "hr_resize_x": int(size[1]), "hr_resize_y": int(size[2])}
    if "Model" in told:
        fields["override_settings"] = {"sd_model_checkpoint": told["Model"]}
    return {name: value for name, value in fields.items() if value is not None}


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return None


_FIELDS: Final[dict[str, tuple[str, type]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler_name", str),
    "Schedule type": ("scheduler", str),
    "CFG scale": ("cfg_scale", float),
    "Seed": ("seed", int),
    "Variation seed": ("subseed", int),
    "Variation seed strength": ("subseed_strength", float),
    "Denoising strength": ("denoising_strength", float),
    "Clip skip": ("clip_skip", int),
    "Hires steps": ("hr_second_pass_steps", int),
    "Hires upscaler": ("hr_upscaler", str),
}
