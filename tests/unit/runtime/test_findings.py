"""A service without a model says where it looked, what lies there, and what is likely to be the mistake."""

import json
from pathlib import Path

from imagemesh_runtime.findings import A_MODEL, listed, nothing_to_serve
from imagemesh_runtime.registry import Repository


def told(*roots: Path) -> str:
    text = nothing_to_serve("vit", Repository(roots))
    assert text.startswith(f"vit has no model to serve: it looked in {', '.join(map(str, roots))}, ")
    assert text.endswith(A_MODEL)
    return text


def put(folder: Path, file: str, **content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(content))


def test_an_empty_root_holds_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert ", which holds no model folder; a model is" in told(tmp_path, tmp_path / "other")


def test_models_of_other_services_are_told_with_their_class(tmp_path: Path) -> None:
    put(tmp_path / "sd", "model_index.json", _class_name="StableDiffusionPipeline")
    put(tmp_path / "google/bert", "config.json", architectures=["BertModel"], model_type="bert")
    put(tmp_path / "odd", "config.json", architectures=[])
    kinds = "sd (StableDiffusionPipeline), odd (of no class), google/bert (BertModel)"
    assert f", which holds {kinds}, and runs none of these; a model is" in told(tmp_path)


def test_a_root_that_is_a_model_itself_is_told_what_to_give(tmp_path: Path) -> None:
    put(tmp_path / "sd", "model_index.json", _class_name="StableDiffusionPipeline")
    assert f"{tmp_path}/sd is a model itself: give the folder that holds it, {tmp_path}; " in told(tmp_path / "sd")


def test_weights_without_a_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "sd15.safetensors").touch()
    assert f"; sd15.safetensors in {tmp_path} is a file and no folder; " in told(tmp_path)
    (tmp_path / "old.CKPT").touch()
    assert f"; old.CKPT, sd15.safetensors in {tmp_path} are files and no folder; " in told(tmp_path)


def test_long_lists_are_cut() -> None:
    assert listed(map(str, range(8))) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
