"""The text encoders in PyTorch: CLIP in windows, and the families whose prompts diffusers' own blocks read whole."""

from imagemesh_services.text_encoder.backends.torch.model import TorchTextEncoder

__all__ = ["TorchTextEncoder"]
