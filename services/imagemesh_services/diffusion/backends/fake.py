"""A sampler to be worked out by hand.

Its pictures' latents start as the seed modulo 256, over 256, everywhere. Evaluation i of n moves them to
x + (target - x) / (n - i), so that after the last they are the target: the mean of each column of the prompt's
embeddings, one column a channel, plus guidance_scale - 1 times its distance from the negative prompt's mean at
evaluations where guidance is on, plus the mean of the middle residual, plus the mean of each reference's embedding
times its scale, plus the mean of the means of each T2I-Adapter's features times their scale. One evaluation is one
step. Prompts that change move the target. Of guiders it knows "CFG" alone, with its start and stop.

A variation moves that start towards the other seed's in a straight line. With a picture they start at strength times
that, plus 1 - strength times the picture's mean; with a mask, cells whose upper left pixel isn't masked are the
picture's mean after every step.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_runtime.limits import check_range
from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array, require_finite
from imagemesh_services.diffusion.backend import Late, Moments, Run, SampleInputs, Steering, Wants
from imagemesh_services.diffusion.checkpoint import FIELD, Checkpoint, check_names
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.features import steers
from imagemesh_services.diffusion.guiders import CFG, Guider
from imagemesh_services.diffusion.phases import Phase, told_in

CHANNELS = 4
SCALE = 8


class FakeRun:
    """See the module."""

    def __init__(self, inputs: SampleInputs) -> None:
        self.evaluations = inputs.steps_to_do
        self.scheduler = inputs.scheduler.class_name if inputs.scheduler else "fake"
        self._inputs = inputs
        self.key = (inputs.width, inputs.height)
        self._done = 0
        starts = np.array([seed % 256 / 256 for seed in inputs.seeds], dtype=np.float32)
        if inputs.variation_strength:
            others = np.array([seed % 256 / 256 for seed in inputs.variation_seeds], dtype=np.float32)
            starts = starts + np.float32(inputs.variation_strength) * (others - starts)
        size = (CHANNELS, inputs.height // SCALE, inputs.width // SCALE)
        self._latents: Array = np.broadcast_to(starts[:, None, None, None], (len(starts), *size)).copy()
        if inputs.image is not None:
            strength = np.float32(inputs.image.strength)
            self._start = _start(inputs.image.source, size)
            self._latents = self._latents * strength + self._start * (1 - strength)

    @property
    def phase(self) -> Phase:
        return self._inputs.phase(self._done)

    @property
    def _target(self) -> Array:
        told = told_in(self._inputs.conditioning, self.phase)
        target = told["prompt_embeds"].mean(axis=(0, 1))
        passes = self._inputs.passes(min(self._done, self.evaluations - 1), self.evaluations)
        if passes.shared > 1:
            negative = told["negative_prompt_embeds"].mean(axis=(0, 1))
            target = target + (self._inputs.guidance_scale - 1) * (target - negative)
        for one in self._inputs.references:
            target = target + np.float32(one.scale * one.positive.mean())
        for features in self._inputs.features:
            if steers(features.start, features.end, self._done, self.evaluations):
                target = target + np.float32(features.scale * np.mean([one.mean() for one in features.tensors]))
        found: Array = target[:, None, None]
        return found

    def embeddings(self) -> Array:
        told = told_in(self._inputs.conditioning, self.phase)
        rows = told["prompt_embeds"].repeat(len(self._inputs.seeds), axis=0)
        if not self._inputs.guided:
            return rows
        negative = told["negative_prompt_embeds"]
        return np.concatenate([negative.repeat(len(self._inputs.seeds), axis=0), rows])

    def added_conditions(self) -> Mapping[str, Array]:
        return {}

    def model_input(self) -> tuple[Array, float]:
        conditions = self._inputs.conditions(self._done, self.evaluations)
        return np.concatenate([self._latents] * conditions), float(self.evaluations - self._done)

    def advance(self, residuals: Steering | None) -> None:
        """The arithmetic of the module's docstring."""
        target = self._target if residuals is None else self._target + residuals.mid.mean()
        self._latents = self._latents + (target - self._latents) / (self.evaluations - self._done)
        self._done += 1
        image = self._inputs.image
        if image is not None and image.mask is not None:
            self._latents = np.where(image.mask[..., ::SCALE, ::SCALE] > 0, self._latents, self._start)

    def steps_done(self) -> int:
        return self._done

    def latents(self) -> Array:
        return self._latents.astype(np.float32)

    def preview(self) -> Array:
        return np.broadcast_to(self._target, self._latents.shape).astype(np.float32)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self._done, tensors={"latents": self._latents.copy()})

    def restore(self, checkpoint: Checkpoint) -> None:
        check_range(f"{FIELD}.evaluation", checkpoint.evaluation, 0, self.evaluations - 1)
        check_names(checkpoint.state, (), f"{FIELD}.state")
        found = checkpoint.tensors.get("latents")
        if found is None or found.shape != self._latents.shape or found.dtype != self._latents.dtype:
            wanted = f"{self._latents.dtype} {list(self._latents.shape)}"
            raise InvalidArgument("resume_from.tensors['latents']", found, wanted)
        self._latents, self._done = (
            require_finite(found, "resume_from.tensors['latents']").copy(),
            checkpoint.evaluation,
        )


def _start(source: Moments | Array, size: tuple[int, int, int]) -> Array:
    """The mean, or the latents resized by repeating the nearest."""
    if isinstance(source, Moments):
        return source.mean
    rows, columns = (np.arange(side) * old // side for side, old in zip(size[1:], source.shape[2:], strict=True))
    return source[:, :, rows][..., columns]


def _check_guider(guider: Guider) -> None:
    if guider.name != CFG.name:
        raise InvalidArgument("guider", guider.name, f"{CFG.name}: the fake backend knows no other")
    for name, value in guider.options.items():
        if name not in ("start", "stop") and value != CFG.options[name]:
            raise InvalidArgument(f"guider_options[{name!r}]", value, "absent: the fake backend knows start and stop")


class FakeDiffusionModel:
    """See the module."""

    scale_factor = multiple = SCALE
    wants = Wants(("prompt_embeds",))
    rounds_up = False
    fingerprint = "fake"

    def find_adapters(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def start(self, inputs: SampleInputs) -> FakeRun:
        width = inputs.conditioning["prompt_embeds"].shape[-1]
        if width != CHANNELS:
            raise InvalidArgument("conditioning['prompt_embeds']", f"width {width}", f"of width {CHANNELS}")
        _check_guider(inputs.guider)
        return FakeRun(inputs)

    def trial(self, width: int, height: int) -> SampleInputs:
        embeds = np.zeros((1, 8, CHANNELS), dtype=np.float32)
        return SampleInputs({"prompt_embeds": embeds}, width, height, 20, 1.0, None, (0,))

    def plus(self, one: Array, other: Array) -> Array:
        result: Array = one + other
        return result

    def advance(self, runs: Sequence[Run], residuals: Sequence[Steering | None]) -> Sequence[Exception | None]:
        faults: list[Exception | None] = []
        for run, added in zip(runs, residuals, strict=True):
            try:
                if added is not None and not np.isfinite(added.mid).all():
                    raise NotFinite("fake", "latents")
                cast(FakeRun, run).advance(added)
                faults.append(None)
            except (Late, NotFinite) as error:
                faults.append(error)
        return faults


class FakeDiffusion:
    """Has one model, "fake"."""

    name, device, dtype = "fake", "cpu", "float32"
    repository = None

    def __init__(self, config: DiffusionConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {"fake": ModelCard("fake", {"width": "64", "height": "64", "multiple": str(SCALE)})}

    def load(self, name: str) -> FakeDiffusionModel:
        return FakeDiffusionModel()
