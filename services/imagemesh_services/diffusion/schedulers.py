"""The schedulers, by the names that Stable Diffusion's users know. Data: adding one is adding a row.

The names are AUTOMATIC1111's, and the classes those that diffusers' documentation gives for them
(https://huggingface.co/docs/diffusers/api/schedulers/overview).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from imagemesh_runtime.errors import NotFound


@dataclass(frozen=True)
class SchedulerChoice:
    """A diffusers class and the settings that replace the model's own."""

    name: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_MULTISTEP = "DPMSolverMultistepScheduler"
_SINGLESTEP = "DPMSolverSinglestepScheduler"

_BASE: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2S": (_SINGLESTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True}),
    "DPM++ 2M": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++ 3M": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "DPM++ 2M SDE": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "SA Solver": ("SASolverScheduler", {}),
    "IPNDM": ("IPNDMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}

# Spacings of the noise levels, which users append to the name, and the classes that have them.
_SPACINGS: Final[Mapping[str, str]] = {
    "Karras": "use_karras_sigmas",
    "Exponential": "use_exponential_sigmas",
    "Beta": "use_beta_sigmas",
}
_SPACED: Final = (
    "Euler", "Heun", "LMS", "DPM2", "DPM2 a", "DPM++ 2S", "DPM++ 2M", "DPM++ 3M", "DPM++ 2M SDE", "DPM++ SDE", "DEIS",
    "UniPC", "SA Solver",
)  # fmt: skip


def _table() -> dict[str, SchedulerChoice]:
    rows = {name: SchedulerChoice(name, *row) for name, row in _BASE.items()}
    for base in _SPACED:
        class_name, options = _BASE[base]
        for spacing, option in _SPACINGS.items():
            name = f"{base} {spacing}"
            rows[name] = SchedulerChoice(name, class_name, {**options, option: True})
    return rows


SCHEDULERS: Final[Mapping[str, SchedulerChoice]] = MappingProxyType(_table())
_BY_FOLDED: Final = {name.casefold(): choice for name, choice in SCHEDULERS.items()}
_CLASSES: Final = {
    choice.class_name: SchedulerChoice(choice.class_name, choice.class_name) for choice in SCHEDULERS.values()
}


def find_scheduler(name: str) -> SchedulerChoice | None:
    """The scheduler of that name (case doesn't matter) or diffusers class name; "" is the model's own, None.

    Raises:
        NotFound: there is none; the error lists the names.
    """
    if not name:
        return None
    choice = _BY_FOLDED.get(name.casefold()) or _CLASSES.get(name)
    if choice is None:
        raise NotFound("scheduler", name, [*SCHEDULERS, *_CLASSES])
    return choice


def name_of(class_name: str, settings: Mapping[str, Any], choices: Iterable[SchedulerChoice]) -> str:
    """What a scheduler of this class and all these settings is called.

    Of the choices whose options are its settings already it is the one that says most ("DPM++ 2M Karras" rather than
    "DPM++ 2M"); the class itself if there is none.
    """
    fitting = [
        choice
        for choice in choices
        if choice.class_name == class_name
        and all(name in settings and settings[name] == value for name, value in choice.options.items())
    ]
    return max(fitting, key=lambda choice: len(choice.options)).name if fitting else class_name
