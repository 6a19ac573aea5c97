"""One generation, evaluation by evaluation: what the UNet gets, and what becomes of its prediction."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLInpaintLoopAfterDenoiser,
    StableDiffusionXLLoopAfterDenoiser,
    StableDiffusionXLLoopBeforeDenoiser,
)

from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.backends.torch.adapters import conditions as picture_conditions
from imagemesh_services.diffusion.backends.torch.adapters import is_condition
from imagemesh_services.diffusion.backends.torch.families import added_conditions, masks_prompts
from imagemesh_services.diffusion.backends.torch.features import Features
from imagemesh_services.diffusion.backends.torch.freezing import Freezer
from imagemesh_services.diffusion.backends.torch.guiders import Guidance
from imagemesh_services.diffusion.backends.torch.preview import clean_latents
from imagemesh_services.diffusion.backends.torch.rows import StepRows
from imagemesh_services.diffusion.backends.torch.start import Variation, from_image, from_noise
from imagemesh_services.diffusion.checkpoint import Checkpoint
from imagemesh_services.diffusion.phases import Phase, told_in
from imagemesh_services.torch_support import to_numpy, to_torch

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
        self.guidance: Guidance = components.guidance
        self._state = self._begin(inputs)
        self._inputs = inputs
        masked = getattr(self._state, "masked_image_latents", None)
        # What a model made for inpainting sees besides the latents.
        self._masked = None if masked is None else (self._state.mask, masked)
        self.evaluations = len(self._state.timesteps)
        self._told: Phase = self.phase
        self._passes_of = self._conditions(inputs)
        self._freezer = Freezer(self._watched, self._generators())
        # Shorter prompts are padded, where the model lets them be.
        prompt = self._passes_of[-1]["prompt_embeds"].shape[2 if masks_prompts(components.unet) else 1 :]
        shapes = (self._state.latents.shape[1:], prompt)
        self._features = Features(inputs, components.unet)
        told = (*(one.positive.shape for one in inputs.references), *(one.shapes for one in inputs.features[:1]))
        self.key: Hashable = (*shapes, self._state.latents.dtype, components.adapted.told, told)

    def check_timesteps(self) -> None:
        """With ``steps_offset``, the largest step counts lead past what the model was trained on.

        Raises:
            InvalidArgument: they do.
        """
        trained = self._components.scheduler.config.num_train_timesteps
        if float(self._state.timesteps.max()) >= trained:
            raise InvalidArgument("steps", self._steps, f"fewer: the model was trained on timesteps below {trained}")

    @property
    def phase(self) -> Phase:
        return self._inputs.phase(self.steps_done())

    def _turn_to_phase(self) -> None:
        """Let the passes be told what holds at the next evaluation."""
        if self.phase != self._told:
            self._told = self.phase
            self._passes_of = self._conditions(self._inputs)

    def embeddings(self) -> Array:
        self._turn_to_phase()
        return self._all("prompt_embeds")

    def added_conditions(self) -> Mapping[str, Array]:
        self._turn_to_phase()
        names = [name for name in self._passes_of[0] if name != "prompt_embeds" and not is_condition(name)]
        return {name: self._all(name) for name in names}

    def _all(self, name: str) -> Array:
        return to_numpy(torch.cat([one[name] for one in self._passes_of]))

    @torch.inference_mode()
    def model_input(self) -> tuple[Array, float]:
        timestep = self._state.timesteps[self._done]
        _BEFORE_DENOISER(self._components, self._state, i=self._done, t=timestep)
        conditions = self._inputs.conditions(self._done, self.evaluations)
        rows = self._state.scaled_latents.repeat(conditions, 1, 1, 1)
        return to_numpy(rows), float(timestep)

    def begin_step(self) -> StepRows:
        """The guider's passes of the next evaluation, as rows of one forward."""
        self._turn_to_phase()
        state, i = self._state, self._done
        timestep = state.timesteps[i]
        _BEFORE_DENOISER(self._components, state, i=i, t=timestep)
        passes = self.guidance.begin(i, self.evaluations, timestep)
        own = self._rows(passes.own, None) if passes.own else None
        return self._rows(passes.shared, own)

    def _rows(self, conditions: Sequence[int], own: StepRows | None) -> StepRows:
        sample = self._state.scaled_latents
        if self._masked is not None:
            sample = torch.cat([sample, *self._masked], dim=1)
        timestep = self._state.timesteps[self._done]
        given = {name: torch.cat([self._passes_of[one][name] for one in conditions]) for name in self._passes_of[-1]}
        rows = sample.repeat(len(conditions), 1, 1, 1)
        prompts = given.pop("prompt_embeds")
        given |= self._features.rows(self._done, self.evaluations, len(rows))
        return StepRows(rows, timestep, prompts, given, conditions, own, self._components.adapted)

    def finish_step(self, prediction: torch.Tensor) -> None:
        """Guidance and the scheduler's step, of the predictions of all passes: those of their own come last.

        Raises:
            NotFinite: the model's prediction isn't finite.
        """
        if not torch.isfinite(prediction).all():
            raise NotFinite(self._components.name, f"predictions at evaluation {self._done + 1} of {self.evaluations}")
        self._state.noise_pred = self.guidance.combine(torch.split(prediction, len(self._state.latents)))
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
        return self._freezer.checkpoint(self._done, self._state.latents)

    def restore(self, checkpoint: Checkpoint) -> None:
        self._state.latents = self._freezer.restore(checkpoint, self._state.latents, self.evaluations)
        self.guidance.check(self._state.latents)
        self._done = checkpoint.evaluation

    def _watched(self) -> dict[str, object]:
        """Whose attributes change from one evaluation to the next."""
        return {"scheduler": self._components.scheduler, **self.guidance.remembers}

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

    def _conditions(self, inputs: SampleInputs) -> list[dict[str, torch.Tensor]]:
        """What the model is told in each of the guider's passes, the negative one first, a row a picture."""
        unet, family = self._components.unet, self._components.family
        inputs = replace(inputs, conditioning=told_in(inputs.conditioning, self._told))
        names = ["negative_prompt_embeds", "prompt_embeds"] if inputs.guided else ["prompt_embeds"]
        return [
            {
                "prompt_embeds": to_torch(inputs.conditioning[name], unet.device, unet.dtype).repeat(
                    len(inputs.seeds), 1, 1
                ),
                **added_conditions(family, inputs, unet, name),
                **picture_conditions(inputs, unet, name),
            }
            for name in names
        ]
