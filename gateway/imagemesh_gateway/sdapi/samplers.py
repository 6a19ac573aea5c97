"""Samplers and schedules: that API has two fields where the mesh has one name."""

from typing import Any, Final

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument

# By that API's names; of the mesh's names they are the last word.
SCHEDULES: Final = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta"}
_AUTOMATIC: Final = frozenset({"", "automatic", "default", "use same scheduler"})
_OWN: Final = frozenset({"", "automatic", "default", "use same sampler", "none"})


def scheduler_name(sampler: str | None, schedule: str | None, field: str = "scheduler") -> str:
    """The mesh's name for both, such as "DPM++ 2M Karras"; "" is the model's own.

    Raises:
        InvalidArgument: no such schedule, or one without a sampler.
    """
    name = sampler or ""
    wanted = (schedule or "").casefold()
    if name.casefold() in _OWN:
        name = ""
    if wanted in _AUTOMATIC:
        return name
    if wanted not in SCHEDULES:
        raise InvalidArgument(field, schedule, ", ".join(["Automatic", *SCHEDULES.values()]))
    if not name:
        raise InvalidArgument(field, schedule, "Automatic where no sampler is named")
    label = SCHEDULES[wanted]
    return name if name.endswith(label) else f"{name} {label}"


def samplers_json(schedulers: list[pb.SchedulerInfo]) -> list[dict[str, Any]]:
    """The samplers, without those whose names have a schedule in them."""
    return [
        {"name": one.name, "aliases": [one.class_name], "options": {}}
        for one in schedulers
        if not one.name.endswith(tuple(SCHEDULES.values()))
    ]


def schedules_json() -> list[dict[str, Any]]:
    """The schedules."""
    named = {"automatic": "Automatic", **SCHEDULES}
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in named.items()
    ]
