"""The table of schedulers."""

from pathlib import Path

import diffusers
import pytest

from imagemesh_runtime.errors import NotFound
from imagemesh_services.diffusion.schedulers import SCHEDULERS, find_scheduler
from tests.support.meant_schedulers import MEANT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_option_is_one_that_the_class_knows(name: str) -> None:
    choice = SCHEDULERS[name]
    cls = getattr(diffusers, choice.class_name)
    made = cls.from_config(diffusers.PNDMScheduler().config, **choice.options)
    assert {option: made.config[option] for option in choice.options} == dict(choice.options)


def test_every_name_stands_for_the_class_and_options_that_its_users_expect() -> None:
    assert {name: (choice.class_name, dict(choice.options)) for name, choice in SCHEDULERS.items()} == MEANT


def test_names_are_found_whatever_their_case_and_classes_by_their_own() -> None:
    assert find_scheduler("dpm++ 2m karras") is SCHEDULERS["DPM++ 2M Karras"]
    by_class = find_scheduler("EulerAncestralDiscreteScheduler")
    assert by_class is not None
    assert (by_class.class_name, dict(by_class.options)) == ("EulerAncestralDiscreteScheduler", {})
    assert find_scheduler("") is None


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(NotFound, match=r"'Eular a' not found, perhaps 'Euler a'; available: .*Euler a"):
        find_scheduler("Eular a")


def test_the_readme_counts_them() -> None:
    assert f"{len(SCHEDULERS)} named schedulers" in (ROOT / "README.md").read_text()
