"""``backend=auto``: the engine that was measured to be fastest, for just what was measured."""

import dataclasses
import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from imagemesh_cli import tune_engines
from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import BackendEntry, LoadedModels, ModelCard, Repository
from imagemesh_services import measuring
from imagemesh_services.automatic import Fastest, open_backend
from imagemesh_services.choices import Choice, choices_path, read_choices, versions_of, write_choices
from imagemesh_services.fingerprint import fingerprint_of
from imagemesh_services.measuring import Timed, open_engines, time_engines


class Slow:
    """Has the models of its folder."""

    name, device, dtype, seconds = "slow", "cpu", "float32", 2.0

    def __init__(self, config: ModelServerConfig) -> None:
        self.repository = Repository.parse(config.models)

    def cards(self) -> Mapping[str, ModelCard]:
        return {name: ModelCard(name) for name in self.repository.folders()}

    def load(self, name: str) -> Any:
        return self


class Quick(Slow):
    """Lacks one of them."""

    name, device, seconds = "quick", "chip", 1.0

    def cards(self) -> Mapping[str, ModelCard]:
        return {name: card for name, card in super().cards().items() if name != "odd"}


class Gone(Slow):
    """Can't be opened."""

    name = "gone"

    def __init__(self, config: ModelServerConfig) -> None:
        raise InvalidArgument("device", config.device, "one of mine")


class Broken(Slow):
    """Can't load."""

    name = "broken"

    def load(self, name: str) -> Any:
        raise RuntimeError("no such operator")


TABLE = {
    cls.name: BackendEntry(f"{__name__}:{cls.__name__}", library="numpy", explicit=cls is Broken)
    for cls in (Slow, Quick, Gone, Broken)
}


@pytest.fixture
def config(tmp_path: Path) -> ModelServerConfig:
    for name in ("one", "two", "odd"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps({"name": name}))
    return ModelServerConfig(models=str(tmp_path / "models"), engines_file=str(tmp_path / "state" / "engines.json"))


def choice(config: ModelServerConfig, model: str, engine: str, **changes: Any) -> Choice:
    found = fingerprint_of([Path(config.models) / model])
    made = Choice(
        config.SERVICE, found, config.device, config.dtype, config.threads, versions_of(TABLE), engine, {engine: 1.0}
    )
    return dataclasses.replace(made, **changes)


def engines(config: ModelServerConfig) -> dict[str, str]:
    """What runs each model."""
    backend = open_backend(TABLE, config)
    return {name: (card.engine or backend).name for name, card in backend.cards().items()}


def test_what_was_not_measured_is_run_by_the_first(config: ModelServerConfig) -> None:
    assert isinstance(open_backend(TABLE, config), Fastest)
    assert engines(config) == {"one": "slow", "two": "slow", "odd": "slow"}


def test_a_named_backend_is_just_that(config: ModelServerConfig) -> None:
    write_choices(choices_path(config), [choice(config, "one", "slow")])
    assert open_backend(TABLE, dataclasses.replace(config, backend="quick")).name == "quick"


def test_each_model_is_run_by_the_engine_that_was_fastest(
    config: ModelServerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_choices(choices_path(config), [choice(config, "one", "quick", seconds={"slow": 0.002, "quick": 0.001})])
    assert engines(config) == {"one": "quick", "two": "slow", "odd": "slow"}
    assert "one is run by quick, the fastest of slow 2.0 ms, quick 1.0 ms" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda"},
        {"dtype": "float16"},
        {"threads": 3},
        {"versions": "numpy 1"},
        {"service": "other"},
        {"model": "another"},
    ],
    ids=str,
)
def test_what_was_measured_elsewhere_is_not_trusted(config: ModelServerConfig, changes: dict[str, Any]) -> None:
    write_choices(choices_path(config), [dataclasses.replace(choice(config, "one", "quick"), **changes)])
    assert engines(config)["one"] == "slow"


def test_a_model_whose_files_changed_is_not_what_was_measured(config: ModelServerConfig) -> None:
    write_choices(choices_path(config), [choice(config, "one", "quick")])
    (Path(config.models) / "one" / "config.json").write_text("{}")
    assert engines(config)["one"] == "slow"


@pytest.mark.parametrize(("model", "engine"), [("one", "gone"), ("odd", "quick"), ("one", "paper")])
def test_where_the_fastest_can_not_be_had_the_first_runs_it(config: ModelServerConfig, model: str, engine: str) -> None:
    write_choices(choices_path(config), [choice(config, model, engine)])
    assert engines(config)[model] == "slow"


async def test_where_the_fastest_can_not_load_the_first_does(
    config: ModelServerConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Quick, name: str) -> Any:
        raise FailedPrecondition("no graph can be kept")

    monkeypatch.setattr(Quick, "load", load)
    write_choices(choices_path(config), [choice(config, "one", "quick")])
    lane = Lane("test")
    try:
        models = LoadedModels(open_backend(TABLE, config), lane, Metrics("test"))
        assert isinstance(await models.get("one"), Slow)
    finally:
        lane.close()
    assert models.engine_of("one").name == "slow"
    assert "quick can't load one: no graph can be kept" in caplog.text


def test_others_may_read_what_was_measured(config: ModelServerConfig) -> None:
    write_choices(choices_path(config), [])
    assert choices_path(config).stat().st_mode & 0o777 == 0o644


def test_a_choice_takes_the_place_of_the_one_before_and_others_stay(config: ModelServerConfig) -> None:
    path = choices_path(config)
    write_choices(path, [choice(config, "one", "slow"), choice(config, "two", "slow")])
    write_choices(path, [choice(config, "one", "quick")])
    assert [(one.model, one.engine) for one in read_choices(path)] == [
        (choice(config, "two", "").model, "slow"),
        (choice(config, "one", "").model, "quick"),
    ]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"version": 2, "choices": []}', '{"version": 1}', '{"version": 1, "choices": {}}',
     '{"version": 1, "choices": [1, {}, {"service": "a"}]}'],
)  # fmt: skip
def test_a_file_that_is_none_is_said_and_nothing_is_chosen(
    config: ModelServerConfig, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = choices_path(config)
    path.parent.mkdir()
    path.write_text(content)
    assert engines(config)["one"] == "slow"
    assert str(path) in caplog.text


def test_the_file_is_the_configured_one_or_the_users_state() -> None:
    assert choices_path(ModelServerConfig(), {"XDG_STATE_HOME": "/s"}) == Path("/s/imagemesh/engines.json")
    assert choices_path(ModelServerConfig(engines_file="/mine"), {}) == Path("/mine")
    assert choices_path(ModelServerConfig(engines_file="~/mine"), {}) == Path.home() / "mine"


def test_engines_are_timed_in_turns_and_the_fastest_is_chosen(config: ModelServerConfig) -> None:
    now, ran = [0.0], []

    def trial(model: Slow) -> Any:
        def work() -> None:
            ran.append(model.name)
            now[0] += model.seconds

        return work

    found = open_engines(TABLE, config)
    assert list(found) == ["slow", "quick"]  # gone can't be had, broken is explicit
    timed = time_engines(found, "one", trial, rounds=3, clock=lambda: now[0])
    assert ran == ["slow", "quick", *("slow", "quick", "quick", "slow", "slow", "quick")]
    assert timed is not None
    assert timed.engine == "quick"
    assert timed.ratios("quick") == [2.0] * 3
    write_choices(choices_path(config), [timed.choice(TABLE, config, found["slow"])])
    assert engines(config)["one"] == "quick"


def test_an_engine_that_has_not_the_model_or_fails_at_it_is_left_out(
    config: ModelServerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    found = {**open_engines(TABLE, config), "broken": Broken(config)}
    timed = time_engines(found, "odd", lambda model: lambda: None, rounds=1)
    assert timed is not None
    assert list(timed.seconds) == ["slow"]
    assert "broken is left out: no such operator" in caplog.text
    assert Timed("odd", {"a": [3.0, 1.0, 2.0], "b": [1.5, 9.0, 1.5]}).engine == "b"


def test_a_model_that_no_engine_can_do_is_said_and_the_others_are_kept(
    config: ModelServerConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Service:
        package = "measured"
        config = ModelServerConfig

    def trial(model: Slow, width: int, height: int) -> Any:
        return lambda: None

    def timed(engines: Any, name: str, trial: Any, rounds: int) -> Timed | None:
        def failing(model: Any) -> Any:
            raise RuntimeError("no such operator")

        return time_engines(engines, name, failing if name == "one" else trial, rounds)

    found = {"measured.backend:BACKENDS": TABLE, "measured.trial:trial": trial}
    monkeypatch.setattr(tune_engines, "resolve_name", found.__getitem__)
    monkeypatch.setattr(tune_engines, "SERVICES", {"mine": Service})
    monkeypatch.setattr(tune_engines, "ROLES", ("mine",))
    monkeypatch.setattr(tune_engines, "configure", lambda *_: config)
    monkeypatch.setattr(measuring, "time_engines", timed)
    args = Namespace(models=None, config=None, model="", size=None, rounds=1, json=False)
    assert tune_engines.tune_engines(args) == 0
    assert "one is left out: no engine can do it" in capsys.readouterr().err
    kept = {one.model for one in read_choices(choices_path(config))}
    assert kept == {choice(config, name, "").model for name in ("two", "odd")}
