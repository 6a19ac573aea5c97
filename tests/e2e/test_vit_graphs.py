"""A folder with a graph answers as the model that it was made of, over the wire and beside other formats."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest

from imagemesh.v1 import image_pb2, model_service_pb2, model_service_pb2_grpc
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.vit.backend import BACKENDS
from imagemesh_services.vit.backends.openvino.export import export_openvino
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.graph import GraphVitModel
from imagemesh_services.vit.service import create
from tests.support import foreign_weights as foreign
from tests.support.backends import open_backend
from tests.support.graphs import build_graph
from tests.support.pictures import scene
from tests.support.services import Served, serving
from tests.support.tiny_vision import BUILDERS

CLOSE = 1e-4
FAMILIES = ("vit", "deit", "dinov2", "dinov2-registers", "swin", "convnext", "resnet")
PICTURES = [scene(), scene(91, 37), scene(3, 50)]
IMAGES = [image_pb2.Image(pixels=to_proto(one)) for one in PICTURES]


def _original(name: str) -> str:
    return name.rpartition("-")[0]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family as it is and as a graph; beside them one for OpenVINO, and one of a forbidden pickle and a graph."""
    root = tmp_path_factory.mktemp("graphs")
    for name in FAMILIES:
        BUILDERS[name](root / name)
        build_graph(root, name, root / f"{name}-graph")
    vino = build_graph(root, "vit", root / "vit-vino")
    export_openvino(vino / "model.onnx", vino / "openvino_model.xml")
    (vino / "model.onnx").unlink()
    both = foreign.with_weights(root / "vit", root / "vit-both", foreign.write_pytorch)
    (both / "onnx").mkdir()
    (both / "onnx" / "model.onnx").write_bytes((root / "vit-graph" / "model.onnx").read_bytes())
    return root


@pytest.fixture(scope="module")
def served_by() -> dict[str, tuple[str, str]]:
    """Backend and format of each folder."""
    found = dict.fromkeys(FAMILIES, ("torch", "safetensors"))
    found |= {f"{name}-graph": ("onnxruntime", "onnx") for name in FAMILIES}
    return found | {"vit-vino": ("openvino", "openvino"), "vit-both": ("onnxruntime", "onnx")}


@pytest.fixture
async def vit(repository: Path) -> AsyncIterator[Served]:
    config = VitConfig(listen="127.0.0.1:0", models=str(repository), device="cpu", threads=2)
    async with serving(create, config) as served:
        yield served


async def test_each_folder_is_run_by_what_reads_its_format_and_the_list_says_so(vit, served_by):
    stub = model_service_pb2_grpc.ModelServiceStub(vit.channel)
    models = (await stub.ListServedModels(model_service_pb2.ListServedModelsRequest())).models
    assert {one.name: (one.backend, one.properties["format"]) for one in models} == served_by


async def _logits(vit: Served, name: str) -> tuple[str, np.ndarray]:
    request = pb.ClassifyImagesRequest(model=name, images=IMAGES, top_k=1000)
    answer = await rpc.VitServiceStub(vit.channel).ClassifyImages(request)
    rows = [sorted(one.predictions, key=lambda found: found.index) for one in answer.classifications]
    return answer.backend, np.array([[found.logit for found in row] for row in rows])


@pytest.mark.parametrize("name", [f"{name}-graph" for name in FAMILIES] + ["vit-vino", "vit-both"])
async def test_a_graph_gives_the_logits_of_its_original(vit, served_by, name):
    backend, got = await _logits(vit, name)
    _, wanted = await _logits(vit, _original(name))
    assert backend == served_by[name][0]
    np.testing.assert_allclose(got, wanted, atol=CLOSE)


@pytest.mark.parametrize("name", ["vit-graph", "dinov2-graph", "convnext-graph", "vit-vino"])
async def test_a_graph_embeds_as_its_original_does(vit, name):
    async def embed(model: str) -> tuple[np.ndarray, np.ndarray]:
        request = pb.EmbedImagesRequest(model=model, images=IMAGES, pooling=pb.POOLING_MEAN, layers=[0, 0])
        answer = await rpc.VitServiceStub(vit.channel).EmbedImages(request)
        return from_proto(answer.embeddings, "embeddings"), from_proto(answer.hidden_states, "hidden_states")

    for got, wanted in zip(await embed(name), await embed(_original(name)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=CLOSE)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("vit-graph", {"attention_maps": True}, "attention_maps must be false"),
        ("vit-graph", {"size": 64}, "size must be 0, 32 for this model"),
        ("resnet-graph", {}, "only classifies"),
    ],
)
async def test_what_a_graph_can_not_do_is_refused(vit, name, fields, said):
    request = pb.EmbedImagesRequest(model=name, images=IMAGES, **fields)
    with pytest.raises(grpc.aio.AioRpcError, match=said):
        await rpc.VitServiceStub(vit.channel).EmbedImages(request)


@pytest.fixture
def folder(repository: Path, tmp_path: Path) -> Path:
    """A copy of vit's graph, to be spoiled."""
    copy = tmp_path / "vit"
    copy.mkdir()
    for file in (repository / "vit-graph").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"id2label": {"0": "a", "1": "b"}}, "must number its 10 labels from 0 on, it has 2"),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "which its graph can't take"),
    ],
    ids=["labels", "processor"],
)
def test_what_does_not_fit_the_graph_is_refused(folder, backend, file, changes, said):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(FailedPrecondition, match=said):
        open_backend(BACKENDS, backend, VitConfig, folder.parent).load("vit")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_torn_graph_is_named(folder, backend):
    (folder / "model.onnx").write_bytes(b"\x08\x08torn")
    with pytest.raises(FailedPrecondition, match=r"model\.onnx can't be read"):
        open_backend(BACKENDS, backend, VitConfig, folder.parent).load("vit")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_graph_of_so_many_pictures_at_a_time_takes_any_number(folder, backend, rows):
    """As many exporters write them."""

    def load() -> GraphVitModel:
        return open_backend(BACKENDS, backend, VitConfig, folder.parent).load("vit")

    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    wanted = load().classify(pixels)
    graph = onnx.load(folder / "model.onnx")
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = rows
    for output in graph.graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = rows
    onnx.save(graph, folder / "model.onnx")
    np.testing.assert_allclose(load().classify(pixels), wanted, atol=1e-5)
