"""A fresh diffusers scheduler for each request, made from the model's own settings."""

import copy
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Final

import diffusers

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.schedulers import SchedulerChoice

# from_config takes up to 0.3 s for some classes; copying what it made, none. Requests may ask for many variants.
_PROTOTYPES: Final = 128
# An option of the step, not of the class.
_STEP: Final = "eta"


class Schedulers:
    """Makes schedulers for a model.

    Args:
        own: the model's own scheduler, whose settings all others begin with.
    """

    def __init__(self, own: Any) -> None:
        self._own = own
        self._prototypes: OrderedDict[Hashable, Any] = OrderedDict()

    def new(self, choice: SchedulerChoice | None, seeds: Sequence[int]) -> Any:
        """A scheduler of the request's own; ``seeds`` are for the class that draws its noise by itself.

        Raises:
            InvalidArgument: diffusers doesn't make such a one for this model.
        """
        if choice is None:
            return copy.deepcopy(self._own)
        scheduler = copy.deepcopy(self._prototype(choice))
        if "noise_sampler_seed" in scheduler.config:
            # This class ignores the request's generator and would draw from the global one.
            scheduler.register_to_config(noise_sampler_seed=list(seeds) if len(seeds) > 1 else seeds[0])
            scheduler.noise_sampler_seed = scheduler.config.noise_sampler_seed
        return scheduler

    def _prototype(self, choice: SchedulerChoice) -> Any:
        options = {name: value for name, value in choice.options.items() if name != _STEP}
        key = (choice.class_name, *sorted(options.items()))
        if key not in self._prototypes:
            cls = getattr(diffusers, choice.class_name)
            try:
                self._prototypes[key] = cls.from_config(self._own.config, **options)
            except (ValueError, NotImplementedError) as error:
                raise InvalidArgument("scheduler", choice.name, f"one that fits the model's own ({error})") from error
            if len(self._prototypes) > _PROTOTYPES:
                self._prototypes.popitem(last=False)
        return self._prototypes[key]
