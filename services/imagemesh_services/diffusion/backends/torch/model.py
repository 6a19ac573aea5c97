"""diffusers' UNets in torch, driven through diffusers' own modular blocks, schedulers and guiders.

Stable Diffusion 1.x and 2.x have no modular blocks of their own in diffusers; SDXL's are the same where the text
encoder's pooled output isn't concerned, so those are run.
"""

from collections.abc import Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLInpaintLoopAfterDenoiser,
    StableDiffusionXLLoopAfterDenoiser,
    StableDiffusionXLLoopBeforeDenoiser,
)
from diffusers.utils import logging as diffusers_logging

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFinite
from imagemesh_runtime.limits import check_range
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_runtime.tensors import Array, require_finite
from imagemesh_services.diffusion.backend import Residuals, Run, SampleInputs
from imagemesh_services.diffusion.backends.torch.object_state import Packer, Unpacker, changes, restore, snapshot
from imagemesh_services.diffusion.backends.torch.preview import clean_latents
from imagemesh_services.diffusion.backends.torch.rows import StepRows, merge_residuals, merge_timesteps
from imagemesh_services.diffusion.backends.torch.scheduler_factory import Schedulers
from imagemesh_services.diffusion.backends.torch.start import (
    LatentScale,
    Variation,
    check_image,
    from_image,
    from_noise,
)
from imagemesh_services.diffusion.checkpoint import FIELD, Checkpoint
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.fingerprint import fingerprint_of
from imagemesh_services.repository import open_repository
from imagemesh_services.torch_support import load_module, pick_device, pick_dtype, set_threads, to_numpy, to_torch

# What an imagemesh.json may say.
_SUITS = {"steps": int, "guidance_scale": float}
# Elements that any tensor of a checkpoint may have: a generator's state has 5056, a training schedule 1000.
_MIN_LIMIT = 8192
_BEFORE_DENOISER = StableDiffusionXLLoopBeforeDenoiser()
_AFTER_DENOISER = StableDiffusionXLLoopAfterDenoiser()
_AFTER_INPAINT_DENOISER = StableDiffusionXLInpaintLoopAfterDenoiser()


class TorchRun:
    """One generation: its own scheduler, guider, generators and block state; the UNet is shared."""

    def __init__(self, components: SimpleNamespace, inputs: SampleInputs) -> None:
        self.scheduler: str = type(components.scheduler).__name__
        self._components = components
        self._steps = inputs.steps_to_do
        blends = inputs.image is not None and inputs.image.mask is not None and inputs.image.masked is None
        self._after = _AFTER_INPAINT_DENOISER if blends else _AFTER_DENOISER
        self._done = 0
        self._passes: list[Any] = []
        self._state = self._begin(inputs)
        self._prompts = self._embeddings(inputs)
        masked = getattr(self._state, "masked_image_latents", None)
        # What a model made for inpainting sees besides the latents.
        self._masked = None if masked is None else (self._state.mask, masked)
        self.evaluations = len(self._state.timesteps)
        self._watched = {"scheduler": components.scheduler, "guider": components.guider}
        self._began = {name: snapshot(thing) for name, thing in self._watched.items()}
        shapes = (self._state.latents.shape[1:], self._prompts["prompt_embeds"].shape[1:])
        self.key: Hashable = (*shapes, self._state.latents.dtype)

    def check_timesteps(self) -> None:
        """With ``steps_offset``, the largest step counts lead past what the model was trained on.

        Raises:
            InvalidArgument: they do.
        """
        trained = self._components.scheduler.config.num_train_timesteps
        if float(self._state.timesteps.max()) >= trained:
            raise InvalidArgument("steps", self._steps, f"fewer: the model was trained on timesteps below {trained}")

    def embeddings(self) -> Array:
        return to_numpy(torch.cat(list(self._prompts.values())))

    @torch.inference_mode()
    def model_input(self) -> tuple[Array, float]:
        timestep = self._state.timesteps[self._done]
        _BEFORE_DENOISER(self._components, self._state, i=self._done, t=timestep)
        rows = self._state.scaled_latents.repeat(len(self._prompts), 1, 1, 1)
        return to_numpy(rows), float(timestep)

    def begin_step(self) -> StepRows:
        """The guider's passes of the next evaluation, as rows of one forward."""
        state, i = self._state, self._done
        timestep = state.timesteps[i]
        _BEFORE_DENOISER(self._components, state, i=i, t=timestep)
        guider = self._components.guider
        guider.set_state(step=i, num_inference_steps=self.evaluations, timestep=timestep)
        self._passes = guider.prepare_inputs({"prompt_embeds": tuple(reversed(self._prompts.values()))})
        # The negative pass comes last from the guider and first in the rows, as in diffusers' classic pipelines.
        prompts = [one.prompt_embeds for one in reversed(self._passes)]
        sample = state.scaled_latents
        if self._masked is not None:
            sample = torch.cat([sample, *self._masked], dim=1)
        return StepRows(sample.repeat(len(prompts), 1, 1, 1), timestep, torch.cat(prompts))

    def finish_step(self, prediction: torch.Tensor) -> None:
        """Guidance and the scheduler's step.

        Raises:
            NotFinite: the model's prediction isn't finite.
        """
        if not torch.isfinite(prediction).all():
            raise NotFinite(self._components.name, f"predictions at evaluation {self._done + 1} of {self.evaluations}")
        for one, part in zip(reversed(self._passes), prediction.chunk(len(self._passes)), strict=True):
            one.noise_pred = part
        self._state.noise_pred = self._components.guider(self._passes)[0]
        self._after(self._components, self._state, i=self._done, t=self._state.timesteps[self._done])
        self._done += 1

    def steps_done(self) -> int:
        """As StableDiffusionPipeline's progress bar counts: warm-up evaluations aside, ``order`` to a step."""
        if self._done == self.evaluations:
            return self._steps
        order: int = self._components.scheduler.order
        warmup = max(self.evaluations - self._steps * order, 0)
        return max(self._done - warmup, 0) // order

    def latents(self) -> Array:
        if not torch.isfinite(self._state.latents).all():
            raise NotFinite(self._components.name, "latents")
        return to_numpy(self._state.latents)

    def preview(self) -> Array:
        state = self._state
        timestep = float(state.timesteps[self._done - 1])
        clean = clean_latents(self._components.scheduler, state.scaled_latents, state.noise_pred, timestep)
        return to_numpy(clean if clean is not None else state.latents)

    def checkpoint(self) -> Checkpoint:
        packer = Packer({"latents": to_numpy(self._state.latents)})
        state: dict[str, Any] = {}
        for name, thing in self._watched.items():
            packed = changes(thing, self._began[name])
            state[name] = {key: packer.pack(value, f"{name}.{key}") for key, value in packed.items()}
        for i, generator in enumerate(self._generators()):
            packer.tensors[f"generator.{i}"] = generator.get_state().numpy()
        return Checkpoint(self._done, state, packer.tensors)

    def restore(self, checkpoint: Checkpoint) -> None:
        check_range("resume_from.evaluation", checkpoint.evaluation, 0, self.evaluations - 1)
        latents = self._state.latents
        limit = max(latents.numel(), 4 * self.evaluations, _MIN_LIMIT)
        unpacker = Unpacker(dict(checkpoint.tensors), latents.device, limit)
        found = unpacker.unpack({"tensor": "latents", "dtype": str(latents.dtype).removeprefix("torch.")}, FIELD)
        if found.shape != latents.shape:
            raise InvalidArgument(f"{FIELD}.tensors['latents'].shape", list(found.shape), str(list(latents.shape)))
        require_finite(checkpoint.tensors["latents"], f"{FIELD}.tensors['latents']")
        for name, thing in self._watched.items():
            restore(thing, checkpoint.state.get(name, {}), unpacker, f"{FIELD}.state.{name}")
        for i, generator in enumerate(self._generators()):
            path = f"{FIELD}.tensors['generator.{i}']"
            try:
                generator.set_state(torch.from_numpy(unpacker.array(f"generator.{i}", "uint8", path).copy()))
            except RuntimeError as error:
                raise InvalidArgument(path, "these bytes", f"a generator's state ({error})") from error
        self._state.latents, self._done = found, checkpoint.evaluation

    def _generators(self) -> list[torch.Generator]:
        given = self._state.generator
        return list(given) if isinstance(given, list) else [given]

    def _begin(self, inputs: SampleInputs) -> Any:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in inputs.seeds]
        state = PipelineState()
        values = {
            "num_inference_steps": inputs.steps,
            "height": inputs.height,
            "width": inputs.width,
            "generator": generators if len(generators) > 1 else generators[0],
            "batch_size": len(generators),
            "num_images_per_prompt": 1,
            "dtype": self._components.unet.dtype,
            "eta": inputs.scheduler.options.get("eta", 0.0) if inputs.scheduler else 0.0,
        }
        for name, value in values.items():
            state.set(name, value)
        with torch.inference_mode():
            variation = Variation(inputs.variation_seeds, inputs.variation_strength)
            if inputs.image is None:
                from_noise(self._components, state, variation)
            else:
                from_image(self._components, state, inputs.image, variation, self._components.latent_scale)
        return SimpleNamespace(**state.values)

    def _embeddings(self, inputs: SampleInputs) -> dict[str, torch.Tensor]:
        """The prompts of the guider's passes, the negative one first, a row a picture."""
        unet = self._components.unet
        names = ["negative_prompt_embeds", "prompt_embeds"] if inputs.guided else ["prompt_embeds"]
        return {
            name: to_torch(inputs.conditioning[name], unet.device, unet.dtype).repeat(len(inputs.seeds), 1, 1)
            for name in names
        }


class TorchDiffusionModel:
    """A UNet with its scheduler's settings; what of the VAE matters here is its scale factor."""

    def __init__(
        self, name: str, unet: Any, scheduler: Any, vae: Mapping[str, Any], max_rows: int, fingerprint: str
    ) -> None:
        self._name = name
        self.fingerprint = fingerprint
        self.scale_factor = _scale_factor(vae)
        self._latent_scale = LatentScale(vae.get("scaling_factor", 0.18215), vae.get("shift_factor") or 0.0)
        self._channels: int = vae.get("latent_channels", 4)
        self._inpaints = unet.config.in_channels == 2 * self._channels + 1
        self._max_rows = max_rows
        self._unet = unet
        self._schedulers = Schedulers(scheduler)

    def start(self, inputs: SampleInputs) -> TorchRun:
        width = self._unet.config.cross_attention_dim
        check_image(inputs, self._channels, self.scale_factor, inpaints=self._inpaints)
        for name, embeds in inputs.conditioning.items():
            if embeds.shape[-1] != width:
                raise InvalidArgument(f"conditioning[{name!r}]", f"width {embeds.shape[-1]}", f"of width {width}")
        components = SimpleNamespace(
            name=self._name,
            unet=self._unet,
            scheduler=self._schedulers.new(inputs.scheduler, inputs.seeds),
            guider=_new_guider(inputs),
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

    @torch.inference_mode()
    def advance(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> list[Exception | None]:
        """One forward for all rows; what fails is rerun alone, so that the fault finds its owner."""
        faults: list[Exception | None] = [None] * len(runs)
        begun: list[tuple[int, StepRows]] = []
        for i, run in enumerate(runs):
            try:
                begun.append((i, cast(TorchRun, run).begin_step()))
            except Exception as error:
                faults[i] = error
        for i, prediction in self._predict(begun, residuals):
            try:
                if isinstance(prediction, Exception):
                    raise prediction
                cast(TorchRun, runs[i]).finish_step(prediction)
            except Exception as error:
                faults[i] = error
        return faults

    def _forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, prompts: torch.Tensor, control: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The UNet on at most ``max_rows`` rows at a time; ``control`` is the down residuals and the middle one."""
        predicted = []
        for start in range(0, len(sample), self._max_rows):
            rows = slice(start, start + self._max_rows)
            residuals: dict[str, Any] = {}
            if control:
                *down, mid = (one[rows] for one in control)
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            time = timestep[rows] if timestep.dim() else timestep
            found = self._unet(sample[rows], time, encoder_hidden_states=prompts[rows], return_dict=False, **residuals)
            predicted.append(found[0])
        return torch.cat(predicted)

    def _predict(
        self, begun: Sequence[tuple[int, StepRows]], residuals: Sequence[Residuals | None]
    ) -> list[tuple[int, torch.Tensor | Exception]]:
        if not begun:
            return []
        parts = [part for _, part in begun]
        try:
            predicted = self._forward(
                torch.cat([part.sample for part in parts]),
                merge_timesteps(parts),
                torch.cat([part.prompts for part in parts]),
                merge_residuals(parts, [residuals[i] for i, _ in begun], self._unet),
            )
        except Exception as error:
            if len(begun) > 1:
                return [found for one in begun for found in self._predict([one], residuals)]
            (i, _), steered = begun[0], residuals[begun[0][0]] is not None
            misfit = FailedPrecondition(f"the ControlNet's residuals don't fit the model: {error}")
            return [(i, misfit if steered and isinstance(error, RuntimeError) else error)]
        split = torch.split(predicted, [len(part.sample) for part in parts])
        return [(i, rows) for (i, _), rows in zip(begun, split, strict=True)]


def _new_guider(inputs: SampleInputs) -> ClassifierFreeGuidance:
    """A guider of this request's own; diffusers warns at each that guiders are experimental, which is no news here."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        return ClassifierFreeGuidance(guidance_scale=inputs.guidance_scale, enabled=inputs.guided)
    finally:
        diffusers_logging.set_verbosity(level)


class TorchDiffusion:
    """Runs the ``unet`` of pipeline folders."""

    name = "torch"

    def __init__(self, config: DiffusionConfig) -> None:
        self._repository = open_repository(config)
        self._device = pick_device(config.device)
        self._dtype = pick_dtype(config.dtype)
        self._max_rows = config.max_batch
        self.device, self.dtype = str(self._device), config.dtype
        set_threads(config.threads)

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self._repository.folders().values(), _card)

    def load(self, name: str) -> TorchDiffusionModel:
        folder = self._repository.folders()[name]
        unet = load_module(UNet2DConditionModel, folder.path / "unet", self._dtype, self._device)
        scheduler = _scheduler_class(folder).from_pretrained(folder.path / "scheduler")
        marks = (self.name, self._dtype, self._device.type, torch.__version__, diffusers.__version__)
        fingerprint = fingerprint_of([folder.path / "unet", folder.path / "scheduler"], *map(str, marks))
        return TorchDiffusionModel(
            name, unet, scheduler, folder.read("vae", "config.json"), self._max_rows, fingerprint
        )


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

    None for what isn't Stable Diffusion 1.x or 2.x: SDXL's UNet wants more conditioning, a consistency-distilled one
    the guidance as an input.
    """
    if not folder.has("unet", "scheduler", "vae") or folder.config["unet"][1] != "UNet2DConditionModel":
        return None
    unet, vae = folder.read("unet", "config.json"), folder.read("vae", "config.json")
    plain = all(unet.get(name) is None for name in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim"))
    channels: int = vae.get("latent_channels", 4)
    if not plain or unet["in_channels"] not in (channels, 2 * channels + 1):
        return None
    scale = _scale_factor(vae)
    side = int(unet["sample_size"]) * scale
    suits = folder.read("imagemesh.json") if (folder.path / "imagemesh.json").exists() else {}
    properties: dict[str, object] = {"class": folder.config["_class_name"]}
    if unet["in_channels"] != channels:
        properties["needs"] = "mask"
    properties |= {"width": side, "height": side, "multiple": scale}
    properties |= {name: kind(suits[name]) for name, kind in _SUITS.items() if name in suits}
    return ModelCard(folder.name, {name: str(value) for name, value in properties.items()})
