"""Loads the image processor of a model's folder; for the backends alone, since transformers is theirs."""

from pathlib import Path
from typing import Any


def load_processor(folder: Path) -> Any:
    """transformers' own, imported only now. torchvision, where it is installed, would resize to other pixels."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil")
