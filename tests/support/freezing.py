"""Runs frozen between two evaluations and gone on with by another model, for one process."""

import dataclasses

import numpy as np

from imagemesh_services.diffusion.backend import DiffusionModel, ImageInputs, Moments, Run, SampleInputs
from imagemesh_services.diffusion.checkpoint import Checkpoint, read_message, to_message

MODES = ("text to image", "image to image", "inpainting", "variation")


def every_mode(width: int) -> dict[str, SampleInputs]:
    """Inputs of 64x64 pixels, two pictures and 4 steps for each of ``MODES``; ``width`` is the embeddings'."""
    numbers = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return numbers.normal(size=shape).astype(np.float32)

    names = ("prompt_embeds", "negative_prompt_embeds")
    plain = SampleInputs({name: drawn(1, 5, width) for name in names}, 64, 64, 4, 3.0, None, (7, 8))
    mask = np.zeros((1, 1, 64, 64), np.uint8)
    mask[..., 16:40, 8:48] = 1
    image = ImageInputs(Moments(drawn(1, 4, 8, 8), drawn(1, 4, 8, 8)), 0.75)
    return {
        "text to image": plain,
        "image to image": dataclasses.replace(plain, image=image),
        "inpainting": dataclasses.replace(plain, image=dataclasses.replace(image, mask=mask, strength=0.9)),
        "variation": dataclasses.replace(plain, variation_seeds=(3, 4), variation_strength=0.3),
    }


def advance(model: DiffusionModel, run: Run, count: int) -> None:
    """So many evaluations, none of which may fail."""
    for _ in range(count):
        assert list(model.advance([run], [None])) == [None]


def travel(checkpoint: Checkpoint, fingerprint: str) -> Checkpoint:
    """As the other replica reads it off the wire."""
    message = type(to_message(checkpoint, fingerprint)).FromString(
        to_message(checkpoint, fingerprint).SerializeToString()
    )
    return read_message(message, fingerprint)


def undisturbed(model: DiffusionModel, inputs: SampleInputs) -> np.ndarray:
    """The latents of a run from its beginning to its end."""
    run = model.start(inputs)
    advance(model, run, run.evaluations)
    return run.latents()


def handed_over(model: DiffusionModel, other: DiffusionModel, inputs: SampleInputs, at: int) -> np.ndarray:
    """The latents of a run that ``other`` goes on with after ``at`` evaluations."""
    run = model.start(inputs)
    advance(model, run, at)
    frozen = travel(run.checkpoint(), model.fingerprint)
    if at < run.evaluations:
        advance(model, run, 1)  # the checkpoint is no view of a run that goes on
    successor = other.start(inputs)
    successor.restore(frozen)
    assert successor.steps_done() <= inputs.steps_to_do
    advance(other, successor, successor.evaluations - at)
    assert successor.steps_done() == inputs.steps_to_do
    return successor.latents()
