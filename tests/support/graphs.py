"""A classifier's folder with an ONNX graph in place of its weights, as ``imagemesh export`` writes it."""

import shutil
from pathlib import Path

from imagemesh_services.vit.backends.torch import TorchVit
from imagemesh_services.vit.backends.torch.export import export_onnx
from imagemesh_services.vit.config import VitConfig


def build_graph(models: Path, name: str, target: Path) -> Path:
    """The model ``name`` of the repository ``models`` as a graph in ``target``."""
    target.mkdir(parents=True)
    backend = TorchVit(VitConfig(models=str(models), device="cpu", threads=2))
    export_onnx(backend.load(name), target / "model.onnx")
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(models / name / file, target / file)
    return target
