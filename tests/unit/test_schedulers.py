"""The table of schedulers."""

from pathlib import Path

import diffusers
import pytest

from imagemesh_runtime.errors import NotFound
from imagemesh_runtime.registry import ModelFolder
from imagemesh_services.diffusion.backends.torch.own_scheduler import scheduler_properties
from imagemesh_services.diffusion.backends.torch.scheduler_factory import Schedulers
from imagemesh_services.diffusion.schedulers import SCHEDULERS, SchedulerChoice, find_scheduler
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_models_own_scheduler_is_called_what_asks_for_the_same(name: str, tmp_path: Path) -> None:
    choice = SCHEDULERS[name]
    cls = getattr(diffusers, choice.class_name)
    own = cls.from_config(diffusers.PNDMScheduler(beta_end=0.03).config, **choice.options)
    own.save_pretrained(tmp_path / "scheduler")
    folder = ModelFolder("mine", tmp_path, {"scheduler": ["diffusers", choice.class_name]})
    assert scheduler_properties(folder, flow=False) == {"scheduler": name, "scheduler_class": choice.class_name}
    assert dict(Schedulers(own).new(choice, [1]).config) == dict(own.config) | seeded(choice)


def seeded(choice: SchedulerChoice) -> dict[str, int]:
    """The one class that is told a request's seed."""
    return {"noise_sampler_seed": 1} if choice.class_name == "DPMSolverSDEScheduler" else {}


@pytest.mark.parametrize(
    ("own", "flow", "name"),
    [
        (diffusers.PNDMScheduler(), False, "PNDMScheduler"),
        (diffusers.DPMSolverMultistepScheduler(solver_order=1), False, "DPMSolverMultistepScheduler"),
        (diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"), False, "Euler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), False, "FlowMatchEulerDiscreteScheduler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), True, "Euler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), True, "Euler a"),
        (diffusers.EulerDiscreteScheduler(), True, "EulerDiscreteScheduler"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, diffusers.SchedulerMixin) else str(value),
)
def test_no_name_is_given_to_settings_that_it_does_not_stand_for(
    own: diffusers.SchedulerMixin, flow: bool, name: str, tmp_path: Path
) -> None:
    own.save_pretrained(tmp_path / "scheduler")
    folder = ModelFolder("mine", tmp_path, {"scheduler": ["diffusers", type(own).__name__]})
    assert scheduler_properties(folder, flow=flow)["scheduler"] == name


def test_what_a_file_leaves_out_is_the_classs_default(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"use_karras_sigmas": true}')
    folder = ModelFolder("mine", tmp_path, {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]})
    assert scheduler_properties(folder, flow=False)["scheduler"] == "DPM++ 2M Karras"


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
