"""VAEs in PyTorch: diffusers' own, and what other engines' backends share with it."""

from imagemesh_services.vae.backends.torch.model import TorchVae

__all__ = ["TorchVae"]
