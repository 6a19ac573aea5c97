"""diffusers' flow-matching transformers in torch: Stable Diffusion 3, Flux, Qwen-Image, Z-Image."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.modular_pipelines.qwenimage.modular_pipeline import QwenImagePachifier

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.registry import ModelCard, ModelFolder
from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import Run, SampleInputs, Steering
from imagemesh_services.diffusion.backends.torch.calls import Call, merge, part, rows_of
from imagemesh_services.diffusion.backends.torch.flow_families import FlowFamily, family_of
from imagemesh_services.diffusion.backends.torch.flow_run import FlowRun, Workflow
from imagemesh_services.diffusion.backends.torch.flow_schedulers import for_flow
from imagemesh_services.diffusion.backends.torch.guiders import Guidance
from imagemesh_services.diffusion.backends.torch.own_scheduler import scheduler_properties
from imagemesh_services.diffusion.backends.torch.scheduler_factory import Schedulers
from imagemesh_services.diffusion.backends.torch.start import LatentScale, check_image
from imagemesh_services.diffusion.backends.torch.together import Begun, advance_together
from imagemesh_services.diffusion.guiders import CFG, GUIDERS, Guider
from imagemesh_services.torch_support import plus

# Latents in each direction that are one of the model's tokens: all of these families patch them so.
_PATCH = 2


class FlowModel:
    """A transformer with its scheduler's settings; what of the VAE matters here is its scale and its factors."""

    rounds_up = True
    plus = staticmethod(plus)

    def __init__(
        self,
        name: str,
        transformer: Any,
        scheduler: Any,
        vae: Mapping[str, Any],
        max_rows: int,
        fingerprint: str,
    ) -> None:
        family = family_of(type(transformer).__name__)
        assert family is not None, "listed only if it is of one"
        self._name = name
        self.fingerprint = fingerprint
        self.wants = family.wants
        self.scale_factor = scale_factor(vae)
        self.multiple = self.scale_factor * _PATCH
        self.widths = {name: int(transformer.config[setting]) for name, setting in family.widths.items()}
        self._family = family
        self.transformer = transformer
        self._scheduler = scheduler
        self._schedulers = Schedulers(scheduler)
        self._max_rows = max_rows
        blocks = getattr(diffusers, family.blocks)()
        self._from_noise, self._from_picture = (Workflow(blocks, name) for name in ("text2image", "image2image"))
        # Where the VAE has scales a channel, it answers scaled latents itself.
        self._latent_scale = LatentScale(vae.get("scaling_factor", 1.0), vae.get("shift_factor") or 0.0)

    def find_adapters(self, names: Sequence[str]) -> list[str]:
        return list(names)  # ``start`` refuses them

    def start(self, inputs: SampleInputs) -> FlowRun:
        image = inputs.image
        if image is not None and image.mask is not None:
            raise InvalidArgument(
                "inputs", ["mask"], f"a map without it: {self._family.name} redraws whole pictures here"
            )
        check_image(inputs, self._family.channels(self.transformer.config), self.scale_factor, inpaints=False)
        for name, given in (("references", inputs.references), ("features", inputs.features)):
            if given:
                raise InvalidArgument(
                    name, f"{len(given)} pictures", f"none: {self._family.name} takes no adapters here"
                )
        self._check_widths(inputs)
        self._check_guider(inputs.guider)
        components = self._components(inputs)
        try:
            return FlowRun(components, self._from_noise if image is None else self._from_picture, inputs)
        except (ValueError, IndexError, ZeroDivisionError, TypeError) as error:
            if inputs.scheduler is None and isinstance(error, TypeError):
                raise  # not the request's fault
            name = type(components.scheduler).__name__
            allowed = f"ones that {name} and {self._family.name} can do together ({error})"
            raise InvalidArgument("scheduler and steps", f"{name}, {inputs.steps}", allowed) from error

    def trial(self, width: int, height: int) -> SampleInputs:
        conditioning: dict[str, Array] = {}
        for name in self.wants.names:
            if name.endswith("_mask"):
                conditioning[name] = np.ones((1, self._family.tokens), np.int64)
            else:
                shape = (1,) if "pooled" in name else (1, self._family.tokens)
                conditioning[name] = np.zeros((*shape, self.widths[name]), np.float32)
        steps, negative = self._family.steps, self.wants.negative
        return SampleInputs(conditioning, width, height, steps, 1.0, None, (0,), guidable=negative)

    @torch.inference_mode()
    def advance(self, runs: Sequence[Run], residuals: Sequence[Steering | None]) -> list[Exception | None]:
        """One forward for all rows; what fails is rerun alone, so that the fault finds its owner."""
        return advance_together(runs, self._predict)

    def _predict(self, begun: Begun) -> list[tuple[int, Any]]:
        if not begun:
            return []
        calls = [call for _, own in begun for call in own]
        try:
            predicted = iter(self._forward(calls))
        except Exception as error:
            if len(begun) > 1:
                return [found for one in begun for found in self._predict([one])]
            return [(begun[0][0], error)]
        return [(i, [next(predicted) for _ in own]) for i, own in begun]

    def _forward(self, calls: Sequence[Call]) -> list[Any]:
        """The model's answer to each call, computed at most ``max_rows`` rows at a time."""
        form = self._family.form
        whole = merge(calls, form)
        found: list[Any] = []
        for start in range(0, rows_of(whole, form), self._max_rows):
            rows = self.transformer(**part(whole, slice(start, start + self._max_rows), form))[0]
            found += list(rows)
        answers, at = [], 0
        for call in calls:
            mine = found[at : at + rows_of(call, form)]
            answers.append(mine if isinstance(call[form.sample], list) else torch.stack(mine))
            at += len(mine)
        return answers

    def _components(self, inputs: SampleInputs) -> SimpleNamespace:
        """What the blocks ask of a pipeline; the VAE and the text encoders are other services'."""
        options = {**inputs.guider.options, **self._family.guider}
        guidance = Guidance(replace(inputs, guider=replace(inputs.guider, options=options)), self.transformer)
        return SimpleNamespace(
            name=self._name,
            family=self._family,
            transformer=self.transformer,
            scheduler=self._schedulers.new(for_flow(inputs.scheduler, self._scheduler), inputs.seeds),
            guider=guidance.library,
            guidance=guidance,
            patch_size=_PATCH,
            latent_scale=self._latent_scale,
            pachifier=QwenImagePachifier(patch_size=_PATCH),
            vae_scale_factor=self.scale_factor,
            vae_scale_factor_spatial=self.multiple,
            num_channels_latents=self._family.channels(self.transformer.config),
            _execution_device=self.transformer.device,
        )

    def _check_guider(self, guider: Guider) -> None:
        if not self.wants.negative and guider != CFG:
            allowed = f"{CFG.name} without options: guidance is an input of {self._family.name} models"
            raise InvalidArgument("guider", guider.name, allowed)
        if guider.changes:
            names = ", ".join(one.name for one in GUIDERS.values() if not one.changes)
            raise InvalidArgument("guider", guider.name, f"one that leaves the layers as they are: {names}")
        zeros = guider.options.get("zero_init_steps")
        if zeros and self._family.keeps_norm:
            raise InvalidArgument("guider_options['zero_init_steps']", zeros, f"0 for {self._family.name}")

    def _check_widths(self, inputs: SampleInputs) -> None:
        for name, width in self.widths.items():
            for one in (name, f"negative_{name}"):
                found = inputs.conditioning.get(one)
                if found is not None and found.shape[-1] != width:
                    raise InvalidArgument(f"conditioning[{one!r}]", f"width {found.shape[-1]}", f"of width {width}")


def scale_factor(vae: Mapping[str, Any]) -> int:
    """Pixels a latent spans, as diffusers derives it from the VAE's configuration."""
    halvings = len(vae["temperal_downsample"]) if "temperal_downsample" in vae else len(vae["block_out_channels"]) - 1
    return int(2**halvings)


def family_in(folder: ModelFolder) -> FlowFamily | None:
    """The family of a pipeline's folder; None: it is of none of these."""
    if not folder.has("transformer", "scheduler", "vae"):
        return None
    family = family_of(folder.config["transformer"][1])
    return family if family is not None and folder.config["_class_name"] in family.pipelines else None


def transformer_class(folder: ModelFolder) -> Any:
    """diffusers' class of the folder's model.

    Raises:
        FailedPrecondition: the folder is no longer what it was when it was listed.
    """
    family = family_in(folder)
    if family is None:
        raise FailedPrecondition(f"model {folder.name} is no longer of a known family")
    return getattr(diffusers, family.transformer)


def card(folder: ModelFolder, suits: Mapping[str, Any]) -> ModelCard | None:
    """The picture's size and what suits the model: ``suits``, or else the classic pipeline's defaults."""
    family = family_in(folder)
    if family is None:
        return None
    transformer, vae = folder.read("transformer", "config.json"), folder.read("vae", "config.json")
    scale = scale_factor(vae)
    side = int(transformer.get("sample_size", 128)) * scale
    properties: dict[str, object] = {"class": folder.config["_class_name"], "family": family.name}
    properties |= {"width": side, "height": side, "multiple": scale * _PATCH}
    properties |= {"steps": family.steps, "guidance_scale": family.guidance, **suits}
    properties |= scheduler_properties(folder, flow=True)
    return ModelCard(folder.name, {name: str(value) for name, value in properties.items()})
