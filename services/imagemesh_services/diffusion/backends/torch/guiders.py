"""diffusers' guiders, one a request: which passes each wants, and what it makes of their predictions.

Most passes are rows of everyone's forward. For some guiders one pass is made by a changed model (attention or blocks
switched off by hooks); it gets forwards of its own, and the hooks are on the model during those alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import diffusers.guiders
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.utils import logging as diffusers_logging

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.checkpoint import FIELD as RESUME_FIELD
from imagemesh_services.diffusion.guiders import FIELD, Guider

# Conditions, counted from the last of a run's: one that isn't guided has the positive one alone.
NEGATIVE, POSITIVE = -2, -1
# Passes that the library makes before the one for which it changes the model.
_BEFORE: Final = {"pred_cond_skip": 2, "pred_uncond": 1}
_BLOCK: Final = re.compile(r"(?P<stack>.+\.transformer_blocks)\.(?P<index>\d+)")
_NAME: Final = "__guidance_identifier__"


@dataclass(frozen=True)
class StepPasses:
    """The conditions of an evaluation's passes, the negative one first, as in diffusers' classic pipelines."""

    shared: Sequence[int]
    own: Sequence[int]


class Guidance:
    """A request's guider.

    Raises:
        InvalidArgument: the model has no such layers.
    """

    def __init__(self, inputs: SampleInputs, unet: Any) -> None:
        self._unet = unet
        self._kind = inputs.guider
        self._seeds = inputs.seeds
        self.draws = self._kind.draws
        self._guider = _new(self._kind, inputs, unet)
        self._hooks: list[str] = getattr(
            self._guider, "_skip_layer_hook_names", getattr(self._guider, "_auto_guidance_hook_names", [])
        )
        self._passes: list[Any] = []
        self._step = 0

    @property
    def library(self) -> Any:
        """The library's guider, for blocks that guide by themselves."""
        return self._guider

    def begin(self, step: int, evaluations: int, timestep: torch.Tensor) -> StepPasses:
        """Which conditions the model is to be given at evaluation ``step`` of so many."""
        self._step = step
        self._guider.set_state(step=step, num_inference_steps=evaluations, timestep=timestep)
        passes = self._guider.prepare_inputs({"condition": (POSITIVE, NEGATIVE)})
        own = [one for one in passes if getattr(one, _NAME) == self._kind.changes]
        # The negative pass comes last from the guider.
        shared = [one for one in reversed(passes) if getattr(one, _NAME) != self._kind.changes]
        self._passes = [*shared, *own]
        # Without classifier-free guidance the library would give the skipping pass the negative condition.
        skips = self._kind.changes == "pred_cond_skip"
        return StepPasses([one.condition for one in shared], [POSITIVE if skips else one.condition for one in own])

    def combine(self, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        """One prediction of those of all passes, shared ones first."""
        for one, prediction in zip(self._passes, predictions, strict=True):
            one.noise_pred = prediction
        combined: torch.Tensor = self._guider(self._passes)[0]
        return combined

    @contextmanager
    def changed(self) -> Iterator[None]:
        """The model as the guider's own pass wants it; after it, whatever happened, as it was."""
        self._guider._count_prepared = _BEFORE[self._kind.changes]
        try:
            self._guider.prepare_models(self._unet)
            yield
        finally:
            registry = HookRegistry.check_if_exists_or_initialize(self._unet)
            for name in self._hooks:
                registry.remove_hook(name, recurse=True)

    @contextmanager
    def drawing(self, picture: int) -> Iterator[None]:
        """What is drawn for a picture's own pass (dropout) comes from its seed and the evaluation, nobody else's."""
        device = self._unet.device
        others = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=others, device_type=device.type if others else None):
            torch.manual_seed((self._seeds[picture] * 1_000_003 + self._step) % (1 << 63))
            yield

    @property
    def remembers(self) -> Mapping[str, object]:
        """The objects whose attributes are what the guider remembers from one evaluation to the next."""
        momentum = getattr(self._guider, "momentum_buffer", None)
        return {} if momentum is None else {"momentum": momentum}

    def check(self, latents: torch.Tensor) -> None:
        """Whether what it was made to remember can be of a run with such latents.

        Raises:
            InvalidArgument: it can't.
        """
        for name, thing in self.remembers.items():
            average = vars(thing)["running_average"]
            if isinstance(average, torch.Tensor):
                fits = average.shape == latents.shape and average.dtype == latents.dtype
            else:
                fits = isinstance(average, int | float) and average == 0
            if not fits:
                path = f"{RESUME_FIELD}.state.{name}.running_average"
                raise InvalidArgument(path, average, f"0 or {latents.dtype} {list(latents.shape)}")


def _new(kind: Guider, inputs: SampleInputs, unet: Any) -> Any:
    """The library's guider; it warns at each that guiders are experimental, which is no news here."""
    options: dict[str, Any] = {}
    for name, value in kind.options.items():
        if name.endswith("_layers"):
            options[name.replace("_layers", "_config").replace("skip_layer_guidance", "skip_layer")] = [
                LayerSkipConfig(indices, fqn=stack, **_skips(kind))
                for stack, indices in blocks(unet, value, f"{FIELD}[{name!r}]").items()
            ]
        else:
            options[name] = value
    if not options.get("adaptive_projected_guidance_momentum", 1):
        options["adaptive_projected_guidance_momentum"] = None
    options.pop("dropout", None)  # the layers' own
    # A scale of 1 turns the library's classifier-free guidance off.
    options["guidance_scale"] = inputs.guidance_scale if inputs.guided else 1.0
    options["enabled"] = inputs.guided or kind.changes == "pred_cond_skip"
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        guider = getattr(diffusers.guiders, kind.class_name)(**options)
    finally:
        diffusers_logging.set_verbosity(level)
    if kind.prefix and not kind.options[f"{kind.prefix}start"]:
        guider.skip_layer_guidance_start = -1.0  # the library takes those after the start; 0 is to mean all
    if hasattr(guider, "momentum_buffer"):
        guider.set_state(step=0, num_inference_steps=1, timestep=None)
        guider.prepare_inputs({})  # makes the buffer
    return guider


def _skips(kind: Guider) -> dict[str, Any]:
    if kind.name == "PAG":
        return {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    return {"dropout": kind.options.get("dropout", 1.0)}


def blocks(unet: Any, layers: str | Sequence[str], field: str) -> dict[str, list[int]]:
    """The transformer blocks of parts of the UNet: indices by the name of their stack.

    Raises:
        InvalidArgument: a part has none, or there is no such part.
    """
    found: dict[str, set[int]] = {}
    every = [match for name, _ in unet.named_modules() if (match := _BLOCK.fullmatch(name))]
    for layer in [layers] if isinstance(layers, str) else layers:
        chosen = [match for match in every if f"{match[0]}.".startswith(f"{layer}.")]
        if not chosen:
            stacks = sorted({match["stack"].removesuffix(".transformer_blocks") for match in every})
            raise InvalidArgument(field, layer, f"a part of the model with transformer blocks: {', '.join(stacks)}")
        for match in chosen:
            found.setdefault(match["stack"], set()).add(int(match["index"]))
    return {stack: sorted(indices) for stack, indices in found.items()}
