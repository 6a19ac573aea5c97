"""What a ControlNet is measured by: a step with guidance, which is two rows."""

from collections.abc import Callable

import numpy as np

from imagemesh_services.controlnet.backend import ControlModel, Loaded, whole


def trial(model: Loaded, width: int, height: int) -> Callable[[], object]:
    """The work, of a picture of that size in pixels."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if not isinstance(model, ControlModel):
        return lambda: model.features(image)
    inputs, sample = model.trial(image)
    run = model.start(inputs)
    return lambda: whole(run, sample, 500.0)
