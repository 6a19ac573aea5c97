"""How to see latents without decoding them: a linear map from a latent to its colour, fitted to the loaded VAE.

Stable Diffusion's users know such maps with published factors for the well-known models; fitting serves any VAE. It
needs no photographs: a latent's colour is mostly that of the pixels under it, so patches of plain colour will do.
"""

from dataclasses import dataclass

import numpy as np

from imagemesh_runtime.tensors import Array
from imagemesh_services.vae.backend import MemoryOptions, VaeModel

PICTURES = 12
# Latents in each direction of a picture that is fitted to.
SIDE = 8


@dataclass(frozen=True)
class PreviewMap:
    """colour = latent . factors + bias: RGB in -1 to 1 of scaled latents; float32 [channels, 3] and [3]."""

    factors: Array
    bias: Array
    # The share of the colours' variance that it explains.
    r_squared: float


def fit(model: VaeModel) -> PreviewMap:
    """Least squares over the latents of patchwork pictures.

    Raises:
        NotFinite: the model gave NaN or infinity.
    """
    rng = np.random.default_rng(0)
    pictures = np.stack([_patchwork(rng, SIDE * model.scale_factor) for _ in range(PICTURES)])
    mean, _ = model.encode(pictures, MemoryOptions(sliced=True))
    latents = (mean.astype(np.float64) - model.shift_factor) * model.scaling_factor
    rows = np.moveaxis(latents, 1, -1).reshape(-1, model.channels)
    blocks = pictures.reshape(PICTURES, SIDE, model.scale_factor, SIDE, model.scale_factor, 3)
    colours = blocks.mean(axis=(2, 4)).reshape(-1, 3) / 127.5 - 1
    design = np.hstack([rows, np.ones((len(rows), 1))])
    found, *_ = np.linalg.lstsq(design, colours, rcond=None)
    missed = ((design @ found - colours) ** 2).sum() / ((colours - colours.mean(axis=0)) ** 2).sum()
    return PreviewMap(found[:-1].astype(np.float32), found[-1].astype(np.float32), float(1 - missed))


def _patchwork(rng: np.random.Generator, side: int) -> Array:
    """uint8 [side, side, 3]: a ground with a few rectangles on it, all of plain colours."""
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = rng.integers(0, 256, 3)
    for _ in range(int(rng.integers(2, 7))):
        (top, bottom), (left, right) = (np.sort(rng.integers(0, side + 1, 2)) for _ in range(2))
        picture[top:bottom, left:right] = rng.integers(0, 256, 3)
    return picture
