"""What a model's own scheduler is called."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import diffusers

from imagemesh_runtime.registry import ModelFolder
from imagemesh_services.diffusion.backends.torch.flow_schedulers import counterparts
from imagemesh_services.diffusion.schedulers import SCHEDULERS, name_of


def scheduler_properties(folder: ModelFolder, *, flow: bool) -> Mapping[str, str]:
    """For the model's card: "scheduler", the name that users know, and "scheduler_class", diffusers' own.

    A request for that name gets what one without any gets; where no name stands for the model's settings, both are
    the class.

    Args:
        flow: whether the model was trained for flow matching, where names mean other classes.
    """
    class_name = str(folder.config["scheduler"][1])
    settings = _defaults(class_name) | folder.read("scheduler", "scheduler_config.json")
    choices = counterparts(settings.get("shift", 1.0)) if flow else list(SCHEDULERS.values())
    return {"scheduler": name_of(class_name, settings, choices), "scheduler_class": class_name}


def _defaults(class_name: str) -> dict[str, Any]:
    """What the class takes where its file says nothing."""
    cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        return {}
    given = signature(cls).parameters.values()
    return {one.name: one.default for one in given if one.default is not Parameter.empty}
