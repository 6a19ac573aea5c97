"""What PreprocessService promises over every backend, and what the torch one owes to transformers."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers
from kornia.contrib.edge_detection import EdgeDetectorBuilder
from PIL import Image
from safetensors.torch import load_file

from imagemesh.v1 import image_pb2
from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh.v1 import preprocess_service_pb2_grpc as rpc
from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.preprocessors import seen
from imagemesh_services.controlnet.preprocessors.backend import BACKENDS, Annotator
from imagemesh_services.controlnet.preprocessors.backends import torch as torch_backend
from imagemesh_services.controlnet.preprocessors.backends.torch import TorchAnnotators
from imagemesh_services.controlnet.preprocessors.table import PREPROCESSORS
from imagemesh_services.controlnet.service import create
from tests.support import tiny_annotators
from tests.support.services import serving

TASKS = {name: one.task for name, one in PREPROCESSORS.items() if one.task}
IMAGE = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_annotators.build_annotators(tmp_path_factory.mktemp("annotators"))


@asynccontextmanager
async def running(folder: Path, backend: str, **settings: Any) -> AsyncIterator[rpc.PreprocessServiceStub]:
    """The service over the models in that folder."""
    config = ControlNetConfig(
        listen="127.0.0.1:0", device="cpu", threads=2, backend=backend, models=str(folder), **settings
    )
    async with serving(create, config) as served:
        yield rpc.PreprocessServiceStub(served.channel)


@pytest.fixture(params=BACKENDS)
async def service(request: pytest.FixtureRequest, annotators: Path) -> AsyncIterator[rpc.PreprocessServiceStub]:
    async with running(annotators, request.param) as stub:
        yield stub


@pytest.fixture
async def bare(tmp_path: Path) -> AsyncIterator[rpc.PreprocessServiceStub]:
    """Without any models."""
    async with running(tmp_path, "torch") as stub:
        yield stub


def request(name: str, image: np.ndarray = IMAGE, **fields: Any) -> pb.PreprocessRequest:
    return pb.PreprocessRequest(preprocessor=name, image=image_pb2.Image(pixels=to_proto(image)), **fields)


def file_of(image: np.ndarray) -> image_pb2.Image:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return image_pb2.Image(encoded=file.getvalue())


def pixels(answer: pb.PreprocessResponse) -> np.ndarray:
    return from_proto(answer.image, "image", dtypes=["uint8"], shape=(None, None, 3))


async def refused(stub: rpc.PreprocessServiceStub, asked: pb.PreprocessRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Preprocess(asked, timeout=20)
    return caught.value.code(), caught.value.details()


async def test_all_are_listed_with_parameters_and_models(service):
    answer = await service.ListPreprocessors(pb.ListPreprocessorsRequest())
    assert [info.name for info in answer.preprocessors] == list(PREPROCESSORS)
    for info in answer.preprocessors:
        assert info.about
        assert info.needs_model == (info.name in TASKS) == bool(info.models)
    canny = {info.name: info for info in answer.preprocessors}["canny"]
    low = canny.parameters[0]
    assert (low.name, low.type, low.default_value, low.minimum, low.maximum) == (
        "low_threshold",
        "integer",
        "100",
        0,
        255,
    )


async def test_every_preprocessor_answers_a_picture_of_the_same_size(service):
    for name in PREPROCESSORS:
        answer = await service.Preprocess(request(name))
        assert pixels(answer).shape == IMAGE.shape, name
        assert answer.preprocessor == name
        assert bool(answer.model) == (name in TASKS)
        assert (answer.backend == "opencv") == (name not in TASKS)


async def test_what_is_drawn_is_what_the_function_draws(service):
    answer = await service.Preprocess(request("Canny", parameters={"low_threshold": "20", "high_threshold": "90"}))
    wanted = PREPROCESSORS["canny"].draw(IMAGE, low_threshold=20, high_threshold=90)
    np.testing.assert_array_equal(pixels(answer), wanted)


async def test_a_file_is_as_good_as_pixels(service):
    answer = await service.Preprocess(pb.PreprocessRequest(preprocessor="softedge", image=file_of(IMAGE)))
    np.testing.assert_array_equal(pixels(answer), pixels(await service.Preprocess(request("softedge"))))


async def test_a_resolution_is_the_shorter_side_of_what_comes_out(service):
    for resolution, size in [(45, (45, 60)), (180, (180, 240)), (90, (90, 120))]:
        for name in ("canny", "depth"):
            assert pixels(await service.Preprocess(request(name, resolution=resolution))).shape == (*size, 3)


async def test_an_unknown_name_is_not_found_and_told_what_there_is(service):
    code, said = await refused(service, request("cany"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "perhaps 'canny'; available: blur, canny" in said


REFUSED = [
    ("canny", {"parameters": {"low_threshold": "256"}}, "parameters['low_threshold'] must be a whole number"),
    ("canny", {"parameters": {"sigma": "1"}}, "parameters must be a map of low_threshold, high_threshold for"),
    ("depth", {"parameters": {"invert": "1"}}, "parameters['invert'] must be true or false"),
    ("canny", {"resolution": 5000}, "resolution must be 16 to 4096, got 5000"),
    ("canny", {"model": "x"}, "model must be empty for preprocessor canny"),
    ("canny", {"image": (4097, 4097)}, "image must be at most 16777216 pixels and 16384 a side"),
    ("canny", {"image": (1, 16_385)}, "got '16385x1 pixels'"),
    ("canny", {"image": (4, 4000), "resolution": 512}, "resolution must be at most 16777216 pixels"),
    ("depth", {"image": (15, 40)}, "image must be at least 16 pixels a side, the longer at most 4 times"),
    ("segmentation", {"image": (20, 81)}, "got '81x20 pixels'"),
]


async def test_what_is_not_allowed_is_named(service):
    for name, fields, said in REFUSED:
        asked = request(name, **{key: value for key, value in fields.items() if key != "image"})
        if "image" in fields:
            asked.image.CopyFrom(file_of(np.zeros(fields["image"], np.uint8)))
        code, details = await refused(service, asked)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said in details


async def test_a_large_picture_is_taken_with_a_resolution(service):
    large = file_of(np.zeros((4000, 5000), np.uint8))
    answer = await service.Preprocess(pb.PreprocessRequest(preprocessor="canny", image=large, resolution=64))
    assert pixels(answer).shape == (64, 80, 3)


async def test_no_picture_is_told(service):
    code, said = await refused(service, pb.PreprocessRequest(preprocessor="canny"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said.startswith("image must be a picture")


async def test_without_a_model_what_needs_one_is_not_found_and_the_rest_works(bare):
    for name in TASKS:
        code, said = await refused(bare, request(name))
        assert code is grpc.StatusCode.NOT_FOUND
        assert f"model for preprocessor {name} 'any' not found; available: none" in said
    assert pixels(await bare.Preprocess(request("canny"))).shape == IMAGE.shape
    listed = await bare.ListPreprocessors(pb.ListPreprocessorsRequest())
    assert [list(info.models) for info in listed.preprocessors if info.needs_model] == [[]] * len(TASKS)


@pytest.mark.parametrize(
    "name", ["softedge_hed", "softedge_pidinet", "lineart_realistic", "lineart_anime", "M-LSD Lines"]
)
async def test_learned_ones_that_are_not_here_are_not_found_and_what_there_is_is_named(bare, name):
    code, said = await refused(bare, request(name))
    assert code is grpc.StatusCode.NOT_FOUND
    assert f"preprocessor {name!r} not found" in said
    assert all(one in said for one in ("softedge_dexined", "lineart", "mlsd"))


async def test_a_model_may_be_named(annotators):
    async with running(annotators, "torch") as stub:
        first, other = [await stub.Preprocess(request("depth", model=name)) for name in ("", "tiny-metric")]
        assert (first.model, other.model) == ("tiny-dpt", "tiny-metric")
        assert (pixels(first) != pixels(other)).any()
        code, said = await refused(stub, request("depth", model="tiny-segformer"))
        assert (code, "available: tiny-dpt, tiny-metric" in said) == (grpc.StatusCode.NOT_FOUND, True)


async def test_the_loop_goes_on_and_the_deadline_holds_while_a_picture_is_worked_on(monkeypatch, tmp_path):
    begun, leave = threading.Event(), threading.Event()

    def stuck(image: np.ndarray) -> np.ndarray:
        begun.set()
        leave.wait(30)
        return image

    monkeypatch.setitem(PREPROCESSORS, "none", type(PREPROCESSORS["none"])("it hangs", stuck))
    async with running(tmp_path, "torch", max_queue=2, max_preprocessing=1, drain_grace_seconds=1) as stub:
        hanging = [stub.Preprocess(request("none"), timeout=3) for _ in range(2)]
        await asyncio.to_thread(begun.wait, 10)
        await stub.ListPreprocessors(pb.ListPreprocessorsRequest(), timeout=2)
        while (code := (await refused(stub, request("invert")))[0]) is grpc.StatusCode.DEADLINE_EXCEEDED:
            pass
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in hanging:
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        leave.set()
        assert pixels(await stub.Preprocess(request("invert"), timeout=20)).shape == IMAGE.shape


# The torch backend against transformers.


@pytest.fixture(scope="module")
def backend(annotators: Path) -> TorchAnnotators:
    return TorchAnnotators(ControlNetConfig(models=str(annotators), device="cpu", threads=2))


@pytest.fixture(scope="module", params=["tiny-dpt", "tiny-metric"])
def depth(request: pytest.FixtureRequest, backend: TorchAnnotators) -> tuple[str, Annotator]:
    return request.param, backend.load(request.param)


def library(cls: Any, path: Path) -> tuple[Any, Any]:
    processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    return processor, cls.from_pretrained(path).eval()


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(90, 120), (64, 64), (200, 50), (16, 16)])
def test_depth_is_transformers_and_metres_are_turned_round(depth, annotators, shape):
    name, annotator = depth
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor, model = library(transformers.AutoModelForDepthEstimation, annotators / name)
    outputs = model(**processor([image], return_tensors="pt"))
    wanted = processor.post_process_depth_estimation(outputs, target_sizes=[shape])[0]["predicted_depth"].numpy()
    assert wanted.std() > 1e-3
    np.testing.assert_allclose(annotator.look(image), -wanted if name == "tiny-metric" else wanted, atol=1e-5)


@torch.inference_mode()
def test_depth_is_drawn_as_the_librarys_pipeline_draws_it(backend, annotators):
    processor, model = library(transformers.AutoModelForDepthEstimation, annotators / "tiny-dpt")
    pipe = transformers.pipeline("depth-estimation", model=model, image_processor=processor)
    wanted = np.asarray(pipe(Image.fromarray(IMAGE))["depth"], dtype=int)
    found = seen.depth(IMAGE, backend.load("tiny-dpt").look(IMAGE), invert=False)
    assert np.abs(found[..., 0] - wanted).max() <= 1


@torch.inference_mode()
def test_edges_are_kornias(backend, annotators):
    detector = EdgeDetectorBuilder.build("dexined", pretrained=False).model.eval()
    detector[1].load_state_dict(load_file(annotators / "dexined" / "model.safetensors"))
    wanted = detector(torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 255)[0, 0].numpy()
    assert wanted.std() > 1e-3
    looking = backend.load("dexined")
    np.testing.assert_allclose(looking.look(IMAGE), wanted, atol=1e-5)
    drawn = seen.edges(IMAGE, wanted)
    np.testing.assert_array_equal(drawn[..., 1], (wanted * 255).round())


def test_edges_of_a_large_picture_are_seen_at_a_smaller_size(backend, monkeypatch):
    monkeypatch.setattr(torch_backend, "_EDGE_PIXELS", 64 * 64)
    found = backend.load("dexined").look(np.zeros((100, 400, 3), np.uint8))
    assert found.shape == (32, 128)
    assert seen.edges(np.zeros((100, 400, 3), np.uint8), found).shape == (100, 400, 3)


def test_weights_that_are_not_dexineds_are_refused(annotators, tmp_path):
    for name in ("none", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").symlink_to(annotators / "dexined" / "config.json")
    (tmp_path / "other" / "model.safetensors").symlink_to(annotators / "tiny-dpt" / "model.safetensors")
    backend = TorchAnnotators(ControlNetConfig(models=str(tmp_path), device="cpu", threads=2))
    with pytest.raises(FailedPrecondition, match=r"none has no model\.safetensors that can be read"):
        backend.load("none")
    with pytest.raises(FailedPrecondition, match="weights of other don't fit"):
        backend.load("other")


@torch.inference_mode()
def test_classes_are_transformers(backend, annotators):
    processor, model = library(transformers.AutoModelForSemanticSegmentation, annotators / "tiny-segformer")
    outputs = model(**processor([IMAGE], return_tensors="pt"))
    wanted = processor.post_process_semantic_segmentation(outputs, target_sizes=[IMAGE.shape[:2]])[0].numpy()
    assert len(np.unique(wanted)) > 3
    np.testing.assert_array_equal(backend.load("tiny-segformer").look(IMAGE), wanted)


def test_classes_of_a_large_picture_are_told_apart_at_a_smaller_size(backend):
    assert backend.load("tiny-segformer").look(np.zeros((1000, 1200, 3), np.uint8)).size <= 1 << 20


@torch.inference_mode()
def poses(annotators: Path, boxes: list[list[float]]) -> np.ndarray:
    processor, model = library(transformers.VitPoseForPoseEstimation, annotators / "tiny-vitpose")
    outputs = model(**processor([IMAGE], boxes=[boxes], return_tensors="pt"))
    found = processor.post_process_pose_estimation(outputs, boxes=[boxes])[0]
    return np.stack([np.column_stack((one["keypoints"], one["scores"])) for one in found])


def test_without_a_detector_the_picture_is_one_person(backend, annotators):
    found = backend.load("tiny-vitpose").look(IMAGE)
    np.testing.assert_allclose(found, poses(annotators, [[0, 0, 120, 90]]), atol=1e-3)


@torch.inference_mode()
def test_a_detector_finds_the_people_to_look_at(annotators, tmp_path):
    (tmp_path / "tiny-vitpose").symlink_to(annotators / "tiny-vitpose")
    tiny_annotators.build_detector(tmp_path / "tiny-detector")
    processor, model = library(transformers.AutoModelForObjectDetection, tmp_path / "tiny-detector")
    outputs = model(**processor([IMAGE], return_tensors="pt"))
    found = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(90, 120)])[0]
    boxes = found["boxes"][found["scores"].argsort(descending=True)].clip(min=0).numpy()
    boxes = np.minimum(boxes, [120, 90, 120, 90])
    wanted = poses(annotators, np.column_stack((boxes[:, :2], boxes[:, 2:] - boxes[:, :2])).tolist())
    assert len(wanted) == 3
    people = TorchAnnotators(ControlNetConfig(models=str(tmp_path), device="cpu", threads=2)).load("tiny-vitpose")
    np.testing.assert_allclose(people.look(IMAGE), wanted, atol=1e-2)


def test_nobody_found_is_nobody_drawn(annotators, tmp_path):
    (tmp_path / "tiny-vitpose").symlink_to(annotators / "tiny-vitpose")
    tiny_annotators.build_detector(tmp_path / "tiny-detector", certain=-20.0)
    people = TorchAnnotators(ControlNetConfig(models=str(tmp_path), device="cpu", threads=2)).load("tiny-vitpose")
    assert people.look(IMAGE).shape == (0, 17, 3)


def test_points_of_whole_bodies_begin_with_cocos_and_fewer_are_refused(tmp_path):
    tiny_annotators.build_vitpose(tmp_path / "few", 14)
    tiny_annotators.build_vitpose(tmp_path / "whole", 21)
    backend = TorchAnnotators(ControlNetConfig(models=str(tmp_path), device="cpu", threads=2))
    assert backend.load("whole").look(IMAGE).shape == (1, 17, 3)
    with pytest.raises(FailedPrecondition, match="few tells 14 points of a body, and COCO's are 17"):
        backend.load("few")
