"""Parts of a training run that cost nothing."""

import pytest
import torch
from diffusers import AutoencoderKL


@pytest.fixture(scope="session")
def quick_vae() -> AutoencoderKL:
    """A random VAE with latents of the shipped one's shape that encodes in no time."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
    ).eval()
