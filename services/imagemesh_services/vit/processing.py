"""How every backend uses the image processor of a model's folder."""

from typing import Any

import numpy as np

from imagemesh_runtime.tensors import Array


def processed(processor: Any, image: Array, **changes: Any) -> Array:
    """uint8 [height, width, 3] to the float32 [3, h, w] that the model wants."""
    # Without its layout named, a picture three pixels high would be taken for channels first.
    batch = processor([image], input_data_format="channels_last", return_tensors="np", **changes)
    pixels: Array = batch["pixel_values"][0].astype(np.float32, copy=False)
    return pixels
