"""Fixtures of all tests."""

import faulthandler
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before anything imports torch: the tests' threads share their cores with others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Gateways keep their jobs there; the tests' ones must not find each other's, nor the user's.
_STATE = tempfile.TemporaryDirectory(prefix="imagemesh-state-", ignore_cleanup_errors=True)
os.environ["XDG_STATE_HOME"] = _STATE.name
# Where graphs of models are kept.
os.environ["XDG_CACHE_HOME"] = os.path.join(_STATE.name, "cache")

_TOO_LONG = 420.0  # seconds; a test alone ends by `timeout` in pyproject.toml, unless it is stuck in native code
_TOO_LONG_TO_END = 90.0  # what a failed test's fixtures have to end
_ERRORS = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give tests that run side by side short folders: with pytest's own, paths of sockets would pass 107 bytes."""
    config.stash[_ERRORS] = os.dup(2)  # before pytest puts a file in its place for each test
    if getattr(config.option, "numprocesses", None) and not config.option.basetemp:
        config.option.basetemp = tempfile.mkdtemp(prefix="im")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process, with every thread's stack shown, when a test or what it leaves hangs for good."""
    _end_after(_TOO_LONG, item.config)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Watch over the fixtures' end too: pytest takes back what watches over a test when that fails."""
    if isinstance(node, pytest.Item):
        _end_after(_TOO_LONG_TO_END, node.config)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show a failure at once, not with the summary, which a run that is cut off never gets to."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed in its {report.when}:\n{report.longreprtext[-4000:]}", flush=True)


def _end_after(seconds: float, config: pytest.Config) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[_ERRORS])


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
