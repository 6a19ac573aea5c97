"""Schedulers for flow-matching models (Lipman et al., "Flow Matching", 2022), by the names that users know.

A name such as "Euler" means another class to them than to a model of noise predictions. The solvers that serve both
are told so by settings of theirs; the rest have no counterpart.
"""

from dataclasses import replace
from inspect import signature
from typing import Any, Final

import diffusers

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.scheduler_options import FIELD, FLOW_SHIFT
from imagemesh_services.diffusion.schedulers import SCHEDULERS, SchedulerChoice

# diffusers' own counterparts.
_COUNTERPARTS: Final = {
    "EulerDiscreteScheduler": ("FlowMatchEulerDiscreteScheduler", {}),
    "EulerAncestralDiscreteScheduler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "HeunDiscreteScheduler": ("FlowMatchHeunDiscreteScheduler", {}),
    "LCMScheduler": ("FlowMatchLCMScheduler", {}),
}
_SOLVERS: Final = frozenset(
    {
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "SASolverScheduler",
    }
)


# These rearrange the noise levels of a noise schedule, which a solver told of a flow has none of.
_SPACINGS: Final = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def for_flow(choice: SchedulerChoice | None, own: Any) -> SchedulerChoice | None:
    """The choice as a model needs it whose own scheduler is ``own``.

    Raises:
        InvalidArgument: that one, or one of its options, is not for such models.
    """
    if choice is None:
        return None
    shift = own.config.get("shift", 1.0)
    found = _counterpart(choice, shift)
    if found is None:
        names = [one.name for one in counterparts(shift)]
        got = f"{choice.name} with {dict(choice.options)}" if choice.options else choice.name
        raise InvalidArgument("scheduler", got, f"one for flow-matching models: {', '.join(names)}")
    return found


def for_noise(choice: SchedulerChoice | None) -> SchedulerChoice | None:
    """The choice, for a model of noise predictions.

    Raises:
        InvalidArgument: one of its options is for flow-matching models.
    """
    if choice is not None and FLOW_SHIFT in choice.options:
        raise InvalidArgument(
            f"{FIELD}[{FLOW_SHIFT!r}]", choice.options[FLOW_SHIFT], "absent: the model is no flow-matching one"
        )
    return choice


def counterparts(shift: float) -> list[SchedulerChoice]:
    """What the names stand for where a model's own scheduler shifts its noise levels so, without those for nothing."""
    found = (_counterpart(choice, shift) for choice in SCHEDULERS.values())
    return [choice for choice in found if choice is not None]


def _counterpart(choice: SchedulerChoice, shift: float) -> SchedulerChoice | None:
    options = dict(choice.options)
    asked = options.pop(FLOW_SHIFT, None)
    if choice.class_name in _SOLVERS:
        if any(options.get(name) for name in _SPACINGS):
            return None
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        return replace(choice, options={**options, **flow, **_shifted(choice.class_name, FLOW_SHIFT, asked)})
    if choice.class_name not in _COUNTERPARTS:
        return None
    class_name, more = _COUNTERPARTS[choice.class_name]
    if set(options) - _parameters(class_name):
        return None
    return SchedulerChoice(choice.name, class_name, {**options, **more, **_shifted(class_name, "shift", asked)})


def _shifted(class_name: str, name: str, asked: float | None) -> dict[str, Any]:
    """The shift that was asked for, also in place of one that goes by the picture's size."""
    if asked is None:
        return {}
    return {name: asked} | {one: False for one in ("use_dynamic_shifting",) if one in _parameters(class_name)}


def _parameters(class_name: str) -> set[str]:
    return set(signature(getattr(diffusers, class_name).__init__).parameters)
