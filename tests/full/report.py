"""What a campaign did and measured, as a page."""

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.sizes import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "grpcio", "protobuf", "numpy")


@dataclass
class Campaign:
    """One file of tests: how they ended, how long they took, and the figures that they measured, in order."""

    title: str
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    figures: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    began: datetime = field(default_factory=lambda: datetime.now(UTC))


class Recorder:
    """A pytest plugin that keeps count; tests tell it their figures through the fixture ``figures``."""

    def __init__(self) -> None:
        self.campaigns: dict[str, Campaign] = {}

    def pytest_itemcollected(self, item: Any) -> None:
        item.user_properties.append(("title", (item.module.__doc__ or item.module.__name__).strip().splitlines()[0]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        properties = dict(report.user_properties)
        campaign = self.campaigns.setdefault(report.nodeid.split("::")[0], Campaign(properties["title"]))
        campaign.seconds += report.duration
        if report.when == "call" or not report.passed:
            campaign.outcomes[report.outcome] += 1
        if report.failed:
            campaign.failures.append(report.nodeid.split("::", 1)[1])
        if report.when == "teardown":
            campaign.figures |= properties.get("figures", {})


def machine() -> Mapping[str, str]:
    """What the figures depend on."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return {
        "commit": commit or "unknown",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {load} at the end",
        "Python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def page(campaigns: Sequence[Campaign], about: Mapping[str, str], began: datetime, ended: datetime) -> str:
    """The report in Markdown."""
    failed = sum(campaign.outcomes["failed"] for campaign in campaigns)
    passed = sum(campaign.outcomes["passed"] for campaign in campaigns)
    minutes = (ended - began).total_seconds() / 60
    lines = [
        f"# The long campaigns, {began:%Y-%m-%d}",
        "",
        f"{passed} passed, {failed} failed. Begun {began:%Y-%m-%d %H:%M} UTC, {minutes:.0f} minutes. "
        "Made by `make test-full`.",
        "",
        "| what | version |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in about.items()),
    ]
    for campaign in campaigns:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(campaign.outcomes.items()))
        lines += ["", f"## {campaign.title.rstrip('.')}", ""]
        lines += [f"Begun {campaign.began:%H:%M} UTC: {counts}, in {campaign.seconds:.0f} s.", ""]
        lines += [f"- {name}: {value}" for name, value in campaign.figures.items()]
        lines += [f"- **failed**: `{name}`" for name in campaign.failures]
    return "\n".join(lines).rstrip() + "\n"


def path_for(folder: Path, began: datetime) -> Path:
    """A name that no earlier report has: the day, and on the second run of a day the time too."""
    path = folder / f"{began:%Y-%m-%d}.md"
    return path if not path.exists() else folder / f"{began:%Y-%m-%d-%H%M}.md"
