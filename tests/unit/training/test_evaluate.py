"""An evaluation can be made in parts."""

import json
from pathlib import Path

import pytest

from imagemesh_training import evaluate


def test_a_group_s_figures_replace_its_own_and_leave_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    evaluate.write(path, "vit", {"renders": 0.5})
    evaluate.write(path, "text_to_image", {"prompts": 2, "drawn_wrong": ["a fox -> bat", "a bat -> fox"]})
    evaluate.write(path, "vit", {"renders": 0.9})
    found = json.loads(path.read_text())
    assert found == {
        "vit": {"renders": 0.9},
        "text_to_image": {"prompts": 2, "drawn_wrong": ["a fox -> bat", "a bat -> fox"]},
    }
    assert "    a fox -> bat\n    a bat -> fox\n" in capsys.readouterr().out


def test_only_a_group_that_there_is_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--only", "beauty"])
    assert "'beauty'" in capsys.readouterr().err
