"""Image classifiers in PyTorch, as transformers has them."""

from imagemesh_services.vit.backends.torch.backend import TorchVit

__all__ = ["TorchVit"]
