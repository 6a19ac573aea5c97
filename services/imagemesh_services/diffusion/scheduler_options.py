"""What of a scheduler a request may set, as data: every option's values, and which classes take it.

The options are those of the classes' constructors in diffusers that say how to sample; those that say what the model
was trained on (betas, prediction type) are the model's. A test holds the table to the installed diffusers. The class is
the one that models of noise predictions have; ``FLOW_SHIFT`` is for flow-matching models alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.schedulers import SchedulerChoice

FIELD: Final = "scheduler_options"
# How far the noise levels of a flow-matching model are shifted towards noise: s * x / (1 + (s - 1) * x).
FLOW_SHIFT: Final = "flow_shift"
MAX_OPTIONS: Final = 16


class Values(Protocol):
    """What an option may be."""

    @property
    def allowed(self) -> str:
        """For errors and lists."""

    def takes(self, value: Any) -> bool:
        """Whether the value, as JSON has it, is one of them."""


@dataclass(frozen=True)
class Option:
    """An option's values: a kind of bool, int, float or str, with bounds for numbers and names for str."""

    kind: type
    low: float = 0
    high: float = 0
    names: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """For errors and lists."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return ", ".join(map(json.dumps, self.names))
        return f"{'a whole number' if self.kind is int else 'a number'} from {self.low:g} to {self.high:g}"

    def takes(self, value: Any) -> bool:
        """Whether the value, as JSON has it, is one of them."""
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if self.kind is str:
            return value in self.names
        right = isinstance(value, int) or (self.kind is float and isinstance(value, float))
        return right and self.low <= value <= self.high


_FLAG = Option(bool)
_SPACINGS: Final = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_THRESHOLDS: Final = {
    "thresholding": _FLAG,
    "dynamic_thresholding_ratio": Option(float, 0, 1),
    "sample_max_value": Option(float, 0, 100),
}
_CLIPS: Final = {"clip_sample": _FLAG, "clip_sample_range": Option(float, 0.01, 100)}
_GRID: Final = {
    "timestep_spacing": Option(str, names=("linspace", "leading", "trailing")),
    "steps_offset": Option(int, 0, 100),
}
_SPACED: Final = {**_GRID, **dict.fromkeys(_SPACINGS, _FLAG)}
_ZERO_SNR: Final = {"rescale_betas_zero_snr": _FLAG}
_SHIFT: Final = {FLOW_SHIFT: Option(float, 0.01, 100)}
_LAST: Final = {"final_sigmas_type": Option(str, names=("zero", "sigma_min"))}
_SOLVER: Final = {"solver_order": Option(int, 1, 3), "lower_order_final": _FLAG}
_MIDPOINT: Final = Option(str, names=("midpoint", "heun"))
_DPM: Final = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")

# By class; "eta" is not the constructor's but the step's.
OPTIONS: Final[Mapping[str, Mapping[str, Option]]] = {
    "DDIMScheduler": {
        **_GRID, **_THRESHOLDS, **_CLIPS, **_ZERO_SNR, "set_alpha_to_one": _FLAG, "eta": Option(float, 0, 1),
    },
    "DDPMScheduler": {**_GRID, **_THRESHOLDS, **_CLIPS, **_ZERO_SNR},
    "PNDMScheduler": {**_GRID, "skip_prk_steps": _FLAG, "set_alpha_to_one": _FLAG},
    "EulerDiscreteScheduler": {
        **_SPACED, **_ZERO_SNR, **_LAST, **_SHIFT, "interpolation_type": Option(str, names=("linear", "log_linear")),
    },
    "EulerAncestralDiscreteScheduler": {**_GRID, **_ZERO_SNR, **_SHIFT},
    "HeunDiscreteScheduler": {**_SPACED, **_CLIPS, **_SHIFT},
    "LMSDiscreteScheduler": _SPACED,
    "KDPM2DiscreteScheduler": _SPACED,
    "KDPM2AncestralDiscreteScheduler": _SPACED,
    "DPMSolverSinglestepScheduler": {
        **dict.fromkeys(_SPACINGS, _FLAG), **_SOLVER, **_THRESHOLDS, **_LAST, **_SHIFT, "solver_type": _MIDPOINT,
    },
    "DPMSolverMultistepScheduler": {
        **_SPACED, **_SOLVER, **_THRESHOLDS, **_ZERO_SNR, **_LAST, "algorithm_type": Option(str, names=_DPM),
        "solver_type": _MIDPOINT, "euler_at_final": _FLAG, "use_lu_lambdas": _FLAG, **_SHIFT,
    },
    "DPMSolverSDEScheduler": _SPACED,
    "DEISMultistepScheduler": {**_SPACED, **_SOLVER, **_THRESHOLDS, **_SHIFT},
    "UniPCMultistepScheduler": {
        **_SPACED, **_SOLVER, **_THRESHOLDS, **_ZERO_SNR, **_LAST, **_SHIFT,
        "solver_type": Option(str, names=("bh1", "bh2")),
    },
    "SASolverScheduler": {
        **_SPACED, **_THRESHOLDS, **_SHIFT, "predictor_order": Option(int, 1, 4), "corrector_order": Option(int, 1, 4),
        "lower_order_final": _FLAG,
    },
    "IPNDMScheduler": {},
    "LCMScheduler": {**_GRID, **_THRESHOLDS, **_CLIPS, **_ZERO_SNR, **_SHIFT, "set_alpha_to_one": _FLAG},
    "TCDScheduler": {
        **_GRID, **_THRESHOLDS, **_CLIPS, **_ZERO_SNR, "set_alpha_to_one": _FLAG, "eta": Option(float, 0, 1),
    },
}  # fmt: skip


def with_options(choice: SchedulerChoice | None, given: Mapping[str, str]) -> SchedulerChoice | None:
    """The scheduler with the options of a request, JSON values by name, on top of what its name stands for.

    Raises:
        InvalidArgument: one that it doesn't take, a value that isn't allowed, or no scheduler to take them.
    """
    if not given:
        return choice
    if choice is None:
        raise InvalidArgument(FIELD, sorted(given), "empty where the request names no scheduler")
    if len(given) > MAX_OPTIONS:
        raise InvalidArgument(FIELD, f"{len(given)} options", f"at most {MAX_OPTIONS}")
    known = OPTIONS[choice.class_name]
    values = dict(choice.options)
    for name, text in sorted(given.items()):
        option = known.get(name)
        if option is None:
            allowed = f"an option that {choice.class_name} takes: {', '.join(sorted(known)) or 'it takes none'}"
            raise InvalidArgument(FIELD, name, allowed)
        values[name] = read_option(f"{FIELD}[{name!r}]", text, option)
    chosen = [name for name in _SPACINGS if name in given and values[name] is True]
    if len(chosen) > 1:
        raise InvalidArgument(FIELD, chosen, "one spacing of the noise levels at a time")
    if chosen:  # it takes the place of the one in the name
        values |= {name: name == chosen[0] for name in _SPACINGS if name in known}
    return replace(choice, options=values)


def read_option(field: str, text: str, option: Values) -> Any:
    """The JSON value in ``text``.

    Raises:
        InvalidArgument: it is none, or not one of the option's.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(field, text, option.allowed) from error
    if not option.takes(value):
        raise InvalidArgument(field, text, option.allowed)
    return value
