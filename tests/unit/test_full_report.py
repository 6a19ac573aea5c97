"""The report of the long campaigns says what ran and what failed, and ``make test`` leaves the campaigns out."""

import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from tests.full.report import Campaign, machine, page, path_for
from tests.support.sizes import ROOT

BEGAN, ENDED = datetime(2026, 3, 1, 9, 30, tzinfo=UTC), datetime(2026, 3, 1, 9, 52, tzinfo=UTC)

CAMPAIGN = '''"""A small campaign."""

import pytest


@pytest.mark.parametrize("i", [1, 2])
def test_counts(figures, i):
    figures[f"figure {i}"] = f"{i} MB"
    assert i == 1
'''


def test_the_page_has_counts_figures_failures_and_versions() -> None:
    soak = Campaign("Minutes.", Counter(passed=1), 240.4, {"memory": "+0.1 MB a minute"}, began=BEGAN)
    kills = Campaign("Kills.", Counter(passed=2, failed=1), 10.0, failures=["test_x[1]"], began=BEGAN)
    told = page([soak, kills], {"torch": "2.13.0"}, BEGAN, ENDED)
    assert told.startswith("# The long campaigns, 2026-03-01\n\n3 passed, 1 failed. Begun 2026-03-01 09:30 UTC, 22 min")
    assert "| torch | 2.13.0 |" in told
    assert "## Minutes\n\nBegun 09:30 UTC: 1 passed, in 240 s.\n\n- memory: +0.1 MB a minute\n" in told
    assert "1 failed, 2 passed, in 10 s." in told
    assert "- **failed**: `test_x[1]`" in told


def test_the_machine_is_described() -> None:
    assert {"commit", "machine", "Python", "torch", "diffusers"} <= set(machine())


def test_a_second_report_of_a_day_does_not_replace_the_first(tmp_path: Path) -> None:
    assert path_for(tmp_path, BEGAN) == tmp_path / "2026-03-01.md"
    (tmp_path / "2026-03-01.md").touch()
    assert path_for(tmp_path, BEGAN) == tmp_path / "2026-03-01-0930.md"


def test_a_campaign_that_runs_is_reported(tmp_path: Path) -> None:
    (tmp_path / "test_small.py").write_text(CAMPAIGN)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "full" / "conftest.py").read_text())
    command = [sys.executable, "-m", "tests.full", "--reports", str(tmp_path / "reports"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    (report,) = (tmp_path / "reports").iterdir()
    told = report.read_text()
    assert "## A small campaign" in told
    assert "1 failed, 1 passed" in told
    assert "- figure 1: 1 MB\n- figure 2: 2 MB\n" in told
    assert "test_counts[2]" in told


def test_make_test_leaves_the_campaigns_out() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "pytest tests --ignore=tests/bench --ignore=tests/full" in makefile
    assert "test-full: test " in makefile
