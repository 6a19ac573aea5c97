"""One generation of a flow-matching transformer, evaluation by evaluation, through diffusers' modular blocks."""

from collections.abc import Hashable, Mapping, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.modular_pipelines import PipelineState

from imagemesh_runtime.errors import FailedPrecondition, NotFinite
from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.backends.torch.calls import Call, answer, key_of, record
from imagemesh_services.diffusion.backends.torch.flow_start import one_or_all, picture, varied_noise
from imagemesh_services.diffusion.backends.torch.freezing import Freezer
from imagemesh_services.diffusion.checkpoint import Checkpoint
from imagemesh_services.torch_support import to_numpy, to_torch


class Workflow:
    """The blocks of one of a family's workflows that the sampler runs: before the loop, in it, and after."""

    def __init__(self, blocks: Any, name: str) -> None:
        stage = {key: one for key, one in blocks.get_workflow(name).sub_blocks.items() if key.startswith("denoise.")}
        names = list(stage)
        at = names.index("denoise.denoise")
        self.loop = stage["denoise.denoise"]
        # Up to where the noise is drawn.
        drawn = next(i for i, key in enumerate(names) if key.endswith("prepare_latents"))
        self.noise = [stage[key] for key in names[: drawn + 1]]
        self.before, self.after = [stage[key] for key in names[:at]], [stage[key] for key in names[at + 1 :]]
        parts = list(self.loop.sub_blocks)
        middle = parts.index("denoiser")
        self.prepare = [self.loop.sub_blocks[key] for key in parts[:middle]]
        self.denoiser = self.loop.sub_blocks["denoiser"]
        self.settle = [self.loop.sub_blocks[key] for key in parts[middle + 1 :]]


class FlowRun:
    """One generation: its own scheduler, guider, generators and block state; the transformer is shared.

    Attributes:
        key: see ``Run``; it holds whatever the blocks say to the model but the number of rows.
    """

    def __init__(self, components: SimpleNamespace, workflow: Workflow, inputs: SampleInputs) -> None:
        self.scheduler: str = type(components.scheduler).__name__
        self._components = components
        self._workflow = workflow
        self._steps = inputs.steps_to_do
        self._done = 0
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in inputs.seeds]
        self._pipeline_state = PipelineState()
        self._state = self._begin(inputs)
        self.evaluations = len(self._state.timesteps)
        # Guiders take it for the length of the loop; some turn themselves off beyond it.
        self._state.num_inference_steps = self.evaluations
        self._freezer = Freezer(self._watched, self._generators)
        self._heading = self._state.latents
        size = (inputs.height, inputs.width)
        self.key: Hashable = (size, key_of(self._calls()[0], components.family.form))

    @property
    def phase(self) -> Hashable:
        """Always the same: these families take prompts as they stand."""
        return 0

    def embeddings(self) -> Array:
        raise FailedPrecondition(f"model {self._components.name}: ControlNets don't steer its family here")

    def added_conditions(self) -> Mapping[str, Array]:
        return {}

    def model_input(self) -> tuple[Array, float]:
        return to_numpy(self._state.latents), float(self._timestep)

    @property
    def _timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self._state.timesteps[self._done]
        return timestep

    def _calls(self) -> list[Call]:
        at: dict[str, Any] = {"i": self._done, "t": self._timestep}
        for block in self._workflow.prepare:
            block(self._components, self._state, **at)
        return record(self._workflow.denoiser, self._components, self._state, self._components.family.form, **at)

    def begin_step(self) -> list[Call]:
        """What the model is asked in the next evaluation, a call for each of the guider's passes."""
        return self._calls()

    def finish_step(self, predictions: Sequence[Any]) -> None:
        """Guidance and the scheduler's step, given the model's answer to each call.

        Raises:
            NotFinite: one isn't finite.
        """
        name = self._components.name
        if not all(torch.isfinite(row).all() for one in predictions for row in one):
            raise NotFinite(name, f"predictions at evaluation {self._done + 1} of {self.evaluations}")
        at: dict[str, Any] = {"i": self._done, "t": self._timestep}
        answer(self._workflow.denoiser, self._components, self._state, predictions, **at)
        # A flow's velocity leads from the picture to the noise, so the picture lies that far back.
        noise = float(self._timestep) / self._components.scheduler.config.num_train_timesteps
        self._heading = self._state.latents - noise * self._state.noise_pred
        drawing = _Drawing(self._components.scheduler, self._generators)
        components = SimpleNamespace(**{**vars(self._components), "scheduler": drawing})
        for block in self._workflow.settle:
            block(components, self._state, **at)
        self._done += 1

    def steps_done(self) -> int:
        """As diffusers' progress bars count: warm-up evaluations aside, ``order`` to a step."""
        if self._done == self.evaluations:
            return self._steps
        order: int = self._components.scheduler.order
        warmup = max(self.evaluations - self._steps * order, 0)
        return max(self._done - warmup, 0) // order

    def latents(self) -> Array:
        if not torch.isfinite(self._state.latents).all():
            raise NotFinite(self._components.name, "latents")
        return self._unpacked(self._state.latents)

    def preview(self) -> Array:
        return self._unpacked(self._heading)

    def checkpoint(self) -> Checkpoint:
        return self._freezer.checkpoint(self._done, self._state.latents)

    def restore(self, checkpoint: Checkpoint) -> None:
        self._state.latents = self._heading = self._freezer.restore(checkpoint, self._state.latents, self.evaluations)
        # The guider remembers predictions, which are of the model's element type whatever the latents' is.
        self._components.guidance.check(self._heading.to(self._components.transformer.dtype))
        self._done = checkpoint.evaluation

    def _watched(self) -> dict[str, object]:
        """Whose attributes change from one evaluation to the next."""
        return {"scheduler": self._components.scheduler, **self._components.guidance.remembers}

    def _begin(self, inputs: SampleInputs) -> Any:
        """The state of the loop, made by the blocks before it."""
        state, generators = self._pipeline_state, self._generators
        values = {
            "num_inference_steps": inputs.steps,
            "height": inputs.height,
            "width": inputs.width,
            "generator": one_or_all(generators),
            "guidance_scale": inputs.guidance_scale,
            **self._conditioning(inputs),
        }
        with torch.inference_mode():
            values |= picture(self._components, inputs, generators)
            values |= varied_noise(self._workflow.noise, self._components, values, generators, inputs)
            for name, value in values.items():
                state.set(name, value)
            for block in self._workflow.before:
                block(self._components, state)
        made = self._workflow.loop.get_block_state(state)
        made.additional_cond_kwargs = {}  # some loops begin so
        return made

    def _conditioning(self, inputs: SampleInputs) -> dict[str, Any]:
        transformer, wants = self._components.transformer, self._components.family.wants
        names = [*wants.names, *(f"negative_{name}" for name in wants.names if inputs.guided)]
        found: dict[str, Any] = {}
        for name in names:
            dtype = None if name.endswith("_mask") else transformer.dtype
            row = to_torch(inputs.conditioning[name], transformer.device, dtype)
            # A prompt a picture: the blocks then take a picture to start from for each, too.
            rows = row.repeat(len(inputs.seeds), *(1,) * (row.dim() - 1))
            found[name] = list(rows) if self._components.family.lists else rows
        return found

    @torch.inference_mode()
    def _unpacked(self, latents: torch.Tensor) -> Array:
        """[pictures, channels, h, w], by the blocks after the loop."""
        self._pipeline_state.set("latents", latents)
        for block in self._workflow.after:
            block(self._components, self._pipeline_state)
        found = self._pipeline_state.get("latents")
        return to_numpy(found[:, :, 0] if found.dim() == 5 else found)


class _Drawing:
    """A scheduler whose steps draw from the run's generators, which the blocks forget to pass."""

    def __init__(self, scheduler: Any, generators: Sequence[torch.Generator]) -> None:
        self._scheduler = scheduler
        self._generators = generators

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, *given: Any, **more: Any) -> Any:
        if "generator" in signature(self._scheduler.step).parameters:
            more["generator"] = one_or_all(self._generators)
        return self._scheduler.step(*given, **more)
