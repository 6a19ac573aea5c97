"""Configuration: which source wins, and that a wrong one is named."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from imagemesh_runtime.config import ServerConfig, load
from imagemesh_runtime.errors import InvalidArgument


@dataclass(frozen=True)
class Config(ServerConfig):
    SERVICE: ClassVar[str] = "text-encoder"
    name: str = "default"
    count: int = 1
    ratio: float = 0.5
    flag: bool = False


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "imagemesh.toml"
        path.write_text(text)
        return path

    return write


def test_without_sources_the_defaults_hold() -> None:
    assert load(Config, {}) == Config()


def test_the_first_source_found_wins(file) -> None:
    path = file('name = "top"\n[text-encoder]\nname = "table"\n')
    env = {"IMAGEMESH_TEXT_ENCODER_NAME": "own", "IMAGEMESH_NAME": "shared"}
    assert load(Config, env, path, name="override").name == "override"
    assert load(Config, env, path).name == "own"
    env.pop("IMAGEMESH_TEXT_ENCODER_NAME")
    assert load(Config, env, path).name == "shared"
    assert load(Config, {}, path).name == "table"
    assert load(Config, {}, file('name = "top"')).name == "top"


def test_another_services_settings_are_not_ours(file) -> None:
    path = file("[vae]\ncount = 5\nnonsense = 1\n")
    assert load(Config, {"IMAGEMESH_VAE_COUNT": "7"}, path) == Config()


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("YES", True), ("1", True), ("false", False), ("0", False)]
)
def test_flags_are_words(text: str, value: bool) -> None:
    assert load(Config, {"IMAGEMESH_FLAG": text}).flag is value


def test_a_file_has_types(file) -> None:
    config = load(Config, {}, file('name = "x"\ncount = 3\nratio = 2\nflag = true'))
    assert (config.name, config.count, config.ratio, config.flag) == ("x", 3, 2.0, True)
    assert isinstance(config.ratio, float)


@pytest.mark.parametrize(
    ("name", "value"), [("COUNT", "many"), ("COUNT", ""), ("COUNT", "1.5"), ("RATIO", "nan"), ("FLAG", "maybe")]
)
def test_a_wrong_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(Config, {f"IMAGEMESH_{name}": value})
    assert caught.value.field == f"IMAGEMESH_{name}"


@pytest.mark.parametrize(
    "line", ["count = 8.5", "count = true", "name = 5", 'name = ["a"]', "ratio = false", "flag = 2"]
)
def test_a_wrong_type_in_a_file_names_its_field(file, line: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(Config, {}, file(f"[text-encoder]\n{line}"))
    assert caught.value.field == line.split()[0]


def test_an_unknown_key_is_named_beside_the_known_ones(file) -> None:
    with pytest.raises(InvalidArgument, match=r"one of .*count") as caught:
        load(Config, {}, file("[text-encoder]\ncuont = 8"))
    assert "text-encoder" in caught.value.field
    assert "'cuont'" in str(caught.value)


@pytest.mark.parametrize("text", ["text-encoder = 3", "not toml at all", "a = 1\na = 2"])
def test_a_broken_file_is_named(file, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"imagemesh\.toml"):
        load(Config, {}, file(text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"absent\.toml"):
        load(Config, {}, tmp_path / "absent.toml")
