"""diffusers' UNets in torch, driven through diffusers' own modular blocks, schedulers and guiders.

Stable Diffusion 1.x and 2.x have no modular blocks of their own in diffusers; SDXL's are the same where the text
encoder's pooled output isn't concerned, so those are run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch
from diffusers import UNet2DConditionModel

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.registry import ModelCard, ModelFolder, Repository, cards_of
from imagemesh_services.diffusion.backend import Late, Run, SampleInputs, Steering, Wants
from imagemesh_services.diffusion.backends.torch import flow_model
from imagemesh_services.diffusion.backends.torch.adapters import Adapters, as_added
from imagemesh_services.diffusion.backends.torch.families import family_of
from imagemesh_services.diffusion.backends.torch.features import taken_out
from imagemesh_services.diffusion.backends.torch.flow_schedulers import for_noise
from imagemesh_services.diffusion.backends.torch.guiders import Guidance
from imagemesh_services.diffusion.backends.torch.injection import Injection, parted
from imagemesh_services.diffusion.backends.torch.own_scheduler import scheduler_properties
from imagemesh_services.diffusion.backends.torch.rows import StepRows, merge_prompts, merge_timesteps
from imagemesh_services.diffusion.backends.torch.run import TorchRun
from imagemesh_services.diffusion.backends.torch.scheduler_factory import Schedulers
from imagemesh_services.diffusion.backends.torch.start import (
    LatentScale,
    check_image,
)
from imagemesh_services.diffusion.backends.torch.together import Begun, advance_together
from imagemesh_services.diffusion.backends.torch.trial import trial_inputs
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.fingerprint import fingerprint_of
from imagemesh_services.torch_support import TorchBackend, load_module, plus

# What an imagemesh.json may say.
_SUITS = {"steps": int, "guidance_scale": float}


class TorchDiffusionModel:
    """A UNet with its scheduler's settings; what of the VAE matters here is its scale factor."""

    rounds_up = False
    plus = staticmethod(plus)
    # How residuals come into the model.
    injection: type[Injection] = Injection

    def __init__(
        self,
        name: str,
        unet: Any,
        scheduler: Any,
        vae: Mapping[str, Any],
        max_rows: int,
        fingerprint: str,
        repository: Repository,
    ) -> None:
        self._name = name
        self.fingerprint = fingerprint
        self.scale_factor = self.multiple = _scale_factor(vae)
        self._latent_scale = LatentScale(vae.get("scaling_factor", 0.18215), vae.get("shift_factor") or 0.0)
        self._channels: int = vae.get("latent_channels", 4)
        self._inpaints = unet.config.in_channels == 2 * self._channels + 1
        family = family_of(unet.config)
        assert family is not None, "listed only if it is of one"
        self._family = family
        self.wants = Wants(family.conditioning)
        self._max_rows = max_rows
        self._unet = unet
        self._schedulers = Schedulers(scheduler)
        self._adapters = Adapters(name, unet, repository)

    def find_adapters(self, names: Sequence[str]) -> list[str]:
        return self._adapters.find(names)

    def start(self, inputs: SampleInputs) -> TorchRun:
        width = self._unet.config.cross_attention_dim
        check_image(inputs, self._channels, self.scale_factor, inpaints=self._inpaints)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = inputs.conditioning.get(name)
            if embeds is not None and embeds.shape[-1] != width:
                raise InvalidArgument(f"conditioning[{name!r}]", f"width {embeds.shape[-1]}", f"of width {width}")
        components = SimpleNamespace(
            name=self._name,
            unet=self._unet,
            family=self._family,
            scheduler=self._schedulers.new(for_noise(inputs.scheduler), inputs.seeds),
            guidance=Guidance(inputs, self._unet),
            adapted=self._adapters.prepare(inputs.references),
            vae_scale_factor=self.scale_factor,
            latent_scale=self._latent_scale,
            num_channels_latents=self._channels,
            # diffusers' word for a UNet that isn't made for inpainting; ours may have latents of any width.
            num_channels_unet=4,
            default_sample_size=self._unet.config.sample_size,
            _execution_device=self._unet.device,
        )
        try:
            run = TorchRun(components, inputs)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            name = type(components.scheduler).__name__
            raise InvalidArgument("steps", inputs.steps, f"a number that {name} can do ({error})") from error
        run.check_timesteps()
        return run

    def trial(self, width: int, height: int) -> SampleInputs:
        latents = (self._channels, height // self.scale_factor, width // self.scale_factor)
        return trial_inputs(self._family, self._unet, latents, (width, height))

    @torch.inference_mode()
    def advance(self, runs: Sequence[Run], residuals: Sequence[Steering | None]) -> list[Exception | None]:
        """One forward for all rows; what fails is rerun alone, so that the fault finds its owner."""
        return advance_together(runs, lambda begun: self._predict_passes(runs, begun, residuals))

    def _predict_passes(
        self, runs: Sequence[Run], begun: Begun, residuals: Sequence[Steering | None]
    ) -> Iterator[tuple[int, torch.Tensor | Exception]]:
        """The shared passes of all, and after each run's its own."""
        own = {i: part.own for i, part in begun if part.own is not None}
        for i, prediction in self._predict(begun, residuals):
            if i not in own or isinstance(prediction, Exception):
                yield i, prediction
                continue
            try:
                changed = self._predict_changed(cast(TorchRun, runs[i]), own[i], residuals[i])
                yield i, torch.cat([prediction, changed])
            except Exception as error:
                yield i, error

    def _predict_changed(self, run: TorchRun, part: StepRows, residuals: Steering | None) -> torch.Tensor:
        """The run's own pass, by the model as its guider changes it meanwhile."""
        count = len(part.sample)
        pictures = [slice(i, i + 1) for i in range(count)] if run.guidance.draws else [slice(0, count)]
        predicted = []
        with run.guidance.changed(), self._adapters.at_work(part.adapted):
            for i, rows in enumerate(pictures):
                control = self.injection(self._unet, [part], [residuals], rows.start)
                given = (part.sample[rows], part.timestep, (part.prompts[rows], None), control)
                with run.guidance.drawing(i) if run.guidance.draws else nullcontext():
                    predicted.append(self._forward(*given, {name: one[rows] for name, one in part.added.items()}))
        return torch.cat(predicted)

    def _forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        told: tuple[torch.Tensor, torch.Tensor | None],
        control: Injection,
        added: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The UNet on at most ``max_rows`` rows at a time; ``told`` as ``merge_prompts`` has it."""
        predicted, (prompts, mask) = [], told
        for start in range(0, len(sample), self._max_rows):
            rows = slice(start, min(start + self._max_rows, len(sample)))
            more: dict[str, Any] = {}
            conditions, features = taken_out({name: values[rows] for name, values in added.items()})
            if conditions:
                more["added_cond_kwargs"] = as_added(conditions)
            if features:
                more["down_intrablock_additional_residuals"] = features
            if mask is not None:
                more["encoder_attention_mask"] = mask[rows]
            time = timestep[rows] if timestep.dim() else timestep
            with control.into(rows):
                found = self._unet(sample[rows], time, encoder_hidden_states=prompts[rows], return_dict=False, **more)
            predicted.append(found[0])
        return torch.cat(predicted)

    def _predict(
        self, begun: Sequence[tuple[int, StepRows]], residuals: Sequence[Steering | None]
    ) -> list[tuple[int, torch.Tensor | Exception]]:
        if not begun:
            return []
        parts = [part for _, part in begun]
        try:
            with self._adapters.at_work(parts[0].adapted):
                predicted = self._forward(
                    torch.cat([part.sample for part in parts]),
                    merge_timesteps(parts),
                    merge_prompts(parts),
                    self.injection(self._unet, parts, [residuals[i] for i, _ in begun]),
                    {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added},
                )
        except Late as late:
            there, missing = parted(begun, residuals)
            return [*self._predict(there, residuals), *((i, late) for i, _ in missing)]
        except Exception as error:
            if len(begun) > 1:
                return [found for one in begun for found in self._predict([one], residuals)]
            (i, part), steered = begun[0], residuals[begun[0][0]] is not None
            who = "ControlNet's residuals" if steered else "T2I-Adapter's features" if part.featured else ""
            misfit = FailedPrecondition(f"the {who} don't fit the model: {error}")
            return [(i, misfit if who and isinstance(error, RuntimeError) else error)]
        split = torch.split(predicted, [len(part.sample) for part in parts])
        return [(i, rows) for (i, _), rows in zip(begun, split, strict=True)]


class TorchDiffusion(TorchBackend):
    """Runs the ``unet`` or the ``transformer`` of pipeline folders."""

    # What is made of UNets.
    model: type[TorchDiffusionModel] = TorchDiffusionModel

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self._max_rows = config.max_batch

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), _card)

    def load(self, name: str) -> TorchDiffusionModel | flow_model.FlowModel:
        folder = self.repository.folders()[name]
        part, cls = "unet", UNet2DConditionModel
        if folder.has("transformer"):
            part, cls = "transformer", flow_model.transformer_class(folder)
        module = self._module(cls, folder.path / part)
        scheduler = _scheduler_class(folder).from_pretrained(folder.path / "scheduler")
        marks = map(str, self._marks())
        fingerprint = fingerprint_of([folder.path / part, folder.path / "scheduler"], *marks)
        vae = folder.read("vae", "config.json")
        given = (name, module, scheduler, vae, self._max_rows, fingerprint)
        return self.model(*given, self.repository) if part == "unet" else flow_model.FlowModel(*given)

    def _marks(self) -> tuple[object, ...]:
        return (*super()._marks(), diffusers.__version__)

    def _module(self, cls: Any, path: Path) -> Any:
        """The module of that class in a folder of its own."""
        return load_module(cls, path, self._dtype, self._device)


def _scheduler_class(folder: ModelFolder) -> Any:
    """The class that the folder names, if it is one of diffusers' schedulers and nothing else of the library."""
    name = folder.config["scheduler"][1]
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise FailedPrecondition(f"model {folder.name}: diffusers has no scheduler {name}")
    return cls


def _scale_factor(vae: Mapping[str, Any]) -> int:
    """Pixels a latent spans, as diffusers derives it from the VAE's configuration."""
    factor: int = 2 ** (len(vae["block_out_channels"]) - 1)
    return factor


def _card(folder: ModelFolder) -> ModelCard | None:
    """The picture's size, and what suits the model as far as an ``imagemesh.json`` in its folder says so.

    None for what is of no family here: a consistency-distilled UNet wants the guidance as an input, for one.
    """
    suits = folder.read("imagemesh.json") if (folder.path / "imagemesh.json").exists() else {}
    suits = {name: kind(suits[name]) for name, kind in _SUITS.items() if name in suits}
    if folder.has("transformer"):
        return flow_model.card(folder, suits)
    if not folder.has("unet", "scheduler", "vae") or folder.config["unet"][1] != "UNet2DConditionModel":
        return None
    unet, vae = folder.read("unet", "config.json"), folder.read("vae", "config.json")
    family = family_of(unet)
    channels: int = vae.get("latent_channels", 4)
    if family is None or unet["in_channels"] not in (channels, 2 * channels + 1):
        return None
    scale = _scale_factor(vae)
    side = int(unet["sample_size"]) * scale
    properties: dict[str, object] = {"class": folder.config["_class_name"], "family": family.name}
    if unet["in_channels"] != channels:
        properties["needs"] = "mask"
    properties |= {"width": side, "height": side, "multiple": scale, **suits}
    properties |= scheduler_properties(folder, flow=False)
    return ModelCard(folder.name, {name: str(value) for name, value in properties.items()})
