"""Fixtures of all tests."""

import os
import shutil
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


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give tests that run side by side short folders: with pytest's own, paths of sockets would pass 107 bytes."""
    if getattr(config.option, "numprocesses", None) and not config.option.basetemp:
        config.option.basetemp = tempfile.mkdtemp(prefix="im")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Leave those folders to look at only where something failed."""
    if getattr(session.config.option, "numprocesses", None) and exitstatus == 0:
        shutil.rmtree(session.config.option.basetemp, ignore_errors=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of small random models: "tiny-sd", "tiny-controlnet" (for tiny-sd) and "tiny-vit"."""
    from tests.support.tiny_models import build_models  # takes seconds that tests without models need not pay

    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def control_image() -> Image.Image:
    """A 64x64 picture for ControlNets to follow: noise, so that every place of it matters."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
