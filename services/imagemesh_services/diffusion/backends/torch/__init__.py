"""The diffusion model in PyTorch: diffusers' UNets, schedulers and guiders, run row by row in shared steps."""

from imagemesh_services.diffusion.backends.torch.model import TorchDiffusion

__all__ = ["TorchDiffusion"]
