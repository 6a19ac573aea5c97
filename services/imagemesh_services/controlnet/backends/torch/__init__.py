"""ControlNets in PyTorch: diffusers' ControlNetModel and ControlNetUnionModel, whose residuals leave block by block."""

from imagemesh_services.controlnet.backends.torch.model import TorchControlNet

__all__ = ["TorchControlNet"]
