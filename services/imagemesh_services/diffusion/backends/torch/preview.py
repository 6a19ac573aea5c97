"""What the model takes the finished latents to be, halfway there."""

import math
from typing import Any

import numpy as np
import torch


def clean_latents(
    scheduler: Any, scaled: torch.Tensor, predicted: torch.Tensor, timestep: float
) -> torch.Tensor | None:
    """The estimate of the latents without noise, after guidance (Ho et al., "Denoising Diffusion", 2020, equation 15).

    ``scaled`` are the latents as the model got them: of unit variance for every scheduler, so that one formula serves
    all, whatever it means by a prediction. None: the scheduler knows no noise schedule of that kind.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "sample":
        return predicted
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    signal = _signal(scheduler.alphas_cumprod, timestep)
    noise = math.sqrt(1 - signal**2)
    if kind == "epsilon":
        return (scaled - noise * predicted) / signal
    if kind == "v_prediction":
        return signal * scaled - noise * predicted
    return None


def _signal(alphas_cumprod: torch.Tensor, timestep: float) -> float:
    """The square root of alpha-bar at a timestep that may lie between two, as schedulers with sigmas choose them."""
    alphas = alphas_cumprod.double().clamp(1e-8, 1 - 1e-8).cpu().numpy()
    log_snr = np.log(alphas / (1 - alphas))
    found = np.interp(timestep, np.arange(len(alphas)), log_snr)
    return math.sqrt(1 / (1 + math.exp(-found)))
