"""The models that come with imagemesh, in the folder layouts of diffusers and transformers."""

from pathlib import Path


def root() -> Path:
    """The folder that holds them, one folder a model."""
    return Path(__file__).parent
