"""The guiders: how the passes of the model become one prediction. Data: adding one is adding a row.

The classes are diffusers' (``diffusers.guiders``), and so are the options and their defaults, except that layers are
named as the UNet names its parts, and that perturbed attention defaults to what diffusers' PAG pipelines do. A test
holds the table to the installed diffusers. Left out of 0.42: smoothed energy guidance never installs its hooks,
magnitude-aware guidance fails on latents of four dimensions, and frequency-decoupled guidance needs kornia.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

from imagemesh_runtime.errors import InvalidArgument, NotFound
from imagemesh_services.diffusion.scheduler_options import MAX_OPTIONS, Option, Values, read_option

FIELD: Final = "guider_options"
_MAX_LAYERS: Final = 32
_MAX_LAYER_NAME: Final = 200


class Layers:
    """Parts of the UNet, whose transformer blocks are meant; whether the model has them is for the backend to say."""

    allowed: Final = (
        f'a part of the UNet, such as "mid_block" or "up_blocks.1.attentions.0", or a list of 1 to {_MAX_LAYERS}'
    )

    def takes(self, value: Any) -> bool:
        names = value if isinstance(value, list) else [value]
        return 1 <= len(names) <= _MAX_LAYERS and all(
            isinstance(name, str) and 1 <= len(name) <= _MAX_LAYER_NAME for name in names
        )


@dataclass(frozen=True)
class Passes:
    """How often a guider wants the model at one evaluation.

    Attributes:
        shared: passes that are rows of everyone's forward.
        own: passes for which the model is changed, in forwards of their own.
    """

    shared: int
    own: int = 0

    @property
    def all(self) -> int:
        return self.shared + self.own


@dataclass(frozen=True)
class Guider:
    """A guider with the options of a request.

    Attributes:
        changes: which prediction is made by a changed model: "pred_cond_skip", "pred_uncond" or "" for none.
        prefix: begins the names of the options that say when, how much and with which layers changed passes count.
    """

    name: str
    class_name: str
    about: str
    accepts: Mapping[str, Values]
    options: Mapping[str, Any]
    changes: str = ""
    prefix: str = ""

    @property
    def draws(self) -> bool:
        """Whether its own passes draw (dropout), which is done a picture at a time, so that each has its own draws."""
        dropout: float = self.options.get("dropout", 0)
        return 0 < dropout < 1

    def passes(self, guided: bool, evaluation: int, evaluations: int) -> Passes:
        """What it wants at this evaluation of so many, by the library's rules; ``guided``: the guidance scale is on."""
        on = self.negates(guided, evaluation, evaluations)
        if self.changes == "pred_uncond":
            return Passes(1, int(on))
        skips = self.changes and self.options[f"{self.prefix}scale"] and self._skips(evaluation, evaluations)
        return Passes(2 if on else 1, int(bool(skips)))

    def negates(self, guided: bool, evaluation: int, evaluations: int) -> bool:
        """Whether a pass is of the negative prompt: guidance is on, and the evaluation is in its interval."""
        return guided and self._within(evaluation, evaluations)

    def stretches(self, guided: bool, evaluations: int, behind: int = 0) -> list[tuple[int, Passes]]:
        """The passes of all evaluations from ``behind`` on: so many evaluations, each of such."""
        cuts = {int(self.options[name] * evaluations) for name in ("start", "stop")}
        if self.prefix:
            first, end = (int(self.options[f"{self.prefix}{name}"] * evaluations) for name in ("start", "stop"))
            cuts |= {first + 1, end}
        edges = [behind, *sorted(cut for cut in cuts if behind < cut < evaluations), evaluations]
        return [(end - at, self.passes(guided, at, evaluations)) for at, end in pairwise(edges)]

    def _within(self, evaluation: int, evaluations: int) -> bool:
        start, stop = (int(self.options[name] * evaluations) for name in ("start", "stop"))
        return start <= evaluation < stop

    def _skips(self, evaluation: int, evaluations: int) -> bool:
        """As the library has it, the evaluation at the start is left out; yet 0 means from the first one on."""
        start, stop = (self.options[f"{self.prefix}{name}"] for name in ("start", "stop"))
        return (not start or int(start * evaluations) < evaluation) and evaluation < int(stop * evaluations)


_Rows = Mapping[str, tuple[Values, Any]]
_FRACTION: Final = Option(float, 0, 1)
_SCALE: Final = Option(float, 0, 100)
_COMMON: Final[_Rows] = {
    "guidance_rescale": (_FRACTION, 0.0),
    "use_original_formulation": (Option(bool), False),
    "start": (_FRACTION, 0.0),
    "stop": (_FRACTION, 1.0),
}
_MOMENTUM: Final = Option(float, -0.99, 0.99)
_NORM: Final = Option(float, 0, 1000)


def _skipping(prefix: str, scale: float, start: float, stop: float) -> _Rows:
    return {
        f"{prefix}scale": (_SCALE, scale),
        f"{prefix}start": (_FRACTION, start),
        f"{prefix}stop": (_FRACTION, stop),
        f"{prefix}layers": (Layers(), "mid_block"),
    }


def _guider(name: str, class_name: str, about: str, rows: _Rows, changes: str = "", prefix: str = "") -> Guider:
    rows = {**_COMMON, **rows}
    accepts = {key: values for key, (values, _) in rows.items()}
    return Guider(name, class_name, about, accepts, {key: value for key, (_, value) in rows.items()}, changes, prefix)


CFG: Final = _guider(
    "CFG", "ClassifierFreeGuidance",
    "Away from the negative prompt (Ho and Salimans, 2022), perhaps rescaled (Lin et al., 2023) and in an interval"
    " alone (Kynkäänniemi et al., 2024).", {},
)  # fmt: skip

GUIDERS: Final[Mapping[str, Guider]] = MappingProxyType({one.name: one for one in (
    CFG,
    _guider(
        "CFG-Zero*", "ClassifierFreeZeroStarGuidance",
        "The negative prediction scaled to fit, and the first steps' predictions zeros (Fan et al., 2025).",
        {"zero_init_steps": (Option(int, 0, 1000), 1)},
    ),
    _guider(
        "APG", "AdaptiveProjectedGuidance",
        "Without what saturates: the part along the prediction weakened, the norm bounded, with momentum"
        " (Sadat et al., 2024).",
        {
            "adaptive_projected_guidance_momentum": (_MOMENTUM, 0.0),
            "adaptive_projected_guidance_rescale": (_NORM, 15.0),
            "eta": (_FRACTION, 1.0),
        },
    ),
    _guider(
        "APG mix", "AdaptiveProjectedMixGuidance",
        "CFG in the first evaluations, then APG, as HunyuanImage 2.1 does.",
        {
            "adaptive_projected_guidance_scale": (_SCALE, 10.0),
            "adaptive_projected_guidance_momentum": (_MOMENTUM, -0.5),
            "adaptive_projected_guidance_rescale": (_NORM, 10.0),
            "adaptive_projected_guidance_start_step": (Option(int, 0, 1000), 5),
            "eta": (_FRACTION, 0.0),
        },
    ),
    _guider(
        "TCFG", "TangentialClassifierFreeGuidance",
        "The negative prediction without what does not agree with the other (Kwon et al., 2025).", {},
    ),
    _guider(
        "PAG", "PerturbedAttentionGuidance",
        "Besides, away from what the model predicts with the attention of some layers switched off (Ahn et al., 2024).",
        _skipping("perturbed_guidance_", 3.0, 0.0, 1.0), "pred_cond_skip", "perturbed_guidance_",
    ),
    _guider(
        "SLG", "SkipLayerGuidance",
        "Besides, away from what the model predicts without some of its layers (Stability AI, 2024).",
        _skipping("skip_layer_guidance_", 2.8, 0.01, 0.2), "pred_cond_skip", "skip_layer_guidance_",
    ),
    _guider(
        "Auto", "AutoGuidance",
        "Away from what the model, with some layers dropped, predicts of the negative prompt (Karras et al., 2024).",
        {"auto_guidance_layers": (Layers(), "mid_block"), "dropout": (_FRACTION, 1.0)}, "pred_uncond",
    ),
)})  # fmt: skip
_BY_FOLDED: Final = {
    key.casefold(): one for one in GUIDERS.values() for key in (one.name, one.name.rstrip("*"), one.class_name)
}


def find_guider(name: str, given: Mapping[str, str]) -> Guider:
    """The guider of that name (case doesn't matter) or diffusers class name, with the options of a request.

    Args:
        name: "" is classifier-free guidance.
        given: JSON values by name.

    Raises:
        NotFound: there is none; the error lists the names.
        InvalidArgument: an option that it doesn't take, or a value that isn't allowed.
    """
    guider = _BY_FOLDED.get(name.casefold()) if name else CFG
    if guider is None:
        raise NotFound("guider", name, list(GUIDERS))
    if len(given) > MAX_OPTIONS:
        raise InvalidArgument(FIELD, f"{len(given)} options", f"at most {MAX_OPTIONS}")
    options = dict(guider.options)
    for key, text in sorted(given.items()):
        values = guider.accepts.get(key)
        if values is None:
            known = ", ".join(sorted(guider.accepts))
            raise InvalidArgument(FIELD, key, f"an option that {guider.name} takes: {known}")
        options[key] = _exact(values, read_option(f"{FIELD}[{key!r}]", text, values))
    _check(options, guider)
    return replace(guider, options=MappingProxyType(options))


def _exact(values: Values, value: Any) -> Any:
    return float(value) if isinstance(values, Option) and values.kind is float else value


def _check(options: Mapping[str, Any], guider: Guider) -> None:
    """What one option's value allows of another's."""
    for prefix in {"", guider.prefix}:
        start, stop = options[f"{prefix}start"], options[f"{prefix}stop"]
        if start >= 1 or start > stop:
            allowed = f"below 1 and at most {prefix}stop, {json.dumps(stop)}"
            raise InvalidArgument(f"{FIELD}['{prefix}start']", start, allowed)
    if options.get("zero_init_steps") and options["guidance_rescale"]:
        # Zeros have no deviation to be rescaled to: the library would answer NaN.
        allowed = "0 where zero_init_steps is above 0"
        raise InvalidArgument(f"{FIELD}['guidance_rescale']", options["guidance_rescale"], allowed)
