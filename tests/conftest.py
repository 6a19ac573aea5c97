"""Fixtures of all tests."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before anything imports torch: the tests' threads share their cores with others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Gateways keep their jobs there; the tests' ones must not find each other's, nor the user's.
_STATE = tempfile.TemporaryDirectory(prefix="imagemesh-state-", ignore_cleanup_errors=True)
os.environ["XDG_STATE_HOME"] = _STATE.name


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of small random models: "tiny-sd", "tiny-controlnet" (for tiny-sd) and "tiny-vit"."""
    from tests.support.tiny_models import build_models  # takes seconds that tests without models need not pay

    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def control_image() -> Image.Image:
    """A 64x64 picture for ControlNets to follow: noise, so that every place of it matters."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
