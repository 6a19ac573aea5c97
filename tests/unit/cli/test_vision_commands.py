"""``classify`` and ``embed``: any number of pictures, in their order, and a bad one is told by its file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, tensor_pb2, vit_service_pb2
from imagemesh_cli import vision_commands
from imagemesh_runtime.errors import NotFound
from tests.support.recording_gateway import RecordingGateway, png
from tests.unit.cli.conftest import Run
from tests.unit.cli.test_process import start


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """More pictures than one call takes, each of another grey."""
    files = [tmp_path / f"{i:03}.png" for i in range(150)]
    for i, file in enumerate(files):
        file.write_bytes(png(i))
    return files


def test_classify_prints_labels(gateway: RecordingGateway, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    file.write_bytes(png(1))
    assert run("classify", file, "--top-k", 2, "--threshold", 0.25, "--model", "vit-tiny") == (
        0,
        f"{file}: cat 75.0%\n{file}: dog 25.0%\n",
        "",
    )
    image = image_pb2.Image(encoded=png(1))
    assert gateway.requests == [pb.ClassifyRequest(images=[image], top_k=2, threshold=0.25, model="vit-tiny")]


def test_classify_as_json(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    file.write_bytes(png(1))
    _, out, _ = run("classify", file, file, "--json")
    cat = {"label": "cat", "probability": 0.75, "index": 4, "logit": 2.5}
    dog = {"label": "dog", "probability": 0.25, "index": 1, "logit": 1.5}
    assert (
        json.loads(out) == [{"file": str(file), "model": "vit-tiny", "backend": "fake", "predictions": [cat, dog]}] * 2
    )


def test_embed_prints_a_line_a_picture(gateway: RecordingGateway, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    file.write_bytes(png(1))
    code, out, _ = run("embed", file, "--pooling", "mean", "--normalize", "--model", "vit-tiny")
    assert (code, out) == (0, f"{file}: 2 numbers, length 0.5000: 0.0000 0.5000 ...\n")
    image = image_pb2.Image(encoded=png(1))
    asked = pb.EmbedRequest(images=[image], pooling=vit_service_pb2.POOLING_MEAN, normalize=True, model="vit-tiny",
                            dtype=tensor_pb2.DTYPE_FP32)  # fmt: skip
    assert gateway.requests == [asked]


def test_embed_as_json_and_as_an_array(run: Run, tmp_path: Path) -> None:
    file, array = tmp_path / "fox.png", tmp_path / "fox.npy"
    file.write_bytes(png(1))
    _, out, _ = run("embed", file, file, "--json", "-o", array)
    assert json.loads(out) == [
        {"file": str(file), "model": "vit-tiny", "backend": "fake", "embedding": [0.0, 0.5]},
        {"file": str(file), "model": "vit-tiny", "backend": "fake", "embedding": [1.0, 1.5]},
    ]
    np.testing.assert_array_equal(np.load(array), [[0, 0.5], [1, 1.5]])


def test_vectors_of_8_bits_are_written_with_their_scales(run: Run, many: list[Path], tmp_path: Path) -> None:
    assert run("embed", many[0], many[1], "--dtype", "int8", "-o", tmp_path / "small.npz")[0] == 0
    small = np.load(tmp_path / "small.npz")
    assert small["vectors"].dtype == np.int8
    np.testing.assert_array_equal(small["vectors"] * small["scales"][:, None], [[0, 0.5], [1, 1.5]])


def greys(gateway: RecordingGateway) -> list[bytes]:
    return [request.images[0].encoded for request in gateway.requests]


@pytest.mark.parametrize("command", ["classify", "embed"])
def test_more_pictures_than_a_call_takes_are_answered_in_their_order(
    gateway: RecordingGateway, run: Run, many: list[Path], command: str
) -> None:
    code, out, err = run(command, *many, "--json")
    assert (code, err) == (0, "")
    assert [answer["file"] for answer in json.loads(out)] == list(map(str, many))
    assert greys(gateway) == [png(i) for i in range(len(many))]


def test_vectors_of_many_pictures_stand_in_their_order(run: Run, many: list[Path], tmp_path: Path) -> None:
    assert run("embed", *many, "-o", tmp_path / "all.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), [[i, i + 0.5] for i in range(len(many))])


def test_vectors_are_written_where_it_was_asked_for(run: Run, many: list[Path], tmp_path: Path) -> None:
    assert run("embed", many[0], "-o", tmp_path / "vectors.bin")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.bin"), [[0, 0.5]])


def test_the_timeout_is_not_shared_by_all_pictures(
    gateway: RecordingGateway, run: Run, many: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_commands, "A_STREAM", 40)
    code, out, _ = run("classify", *many, "--json")
    assert (code, len(json.loads(out)), gateway.streams) == (0, 150, 4)
    assert greys(gateway) == [png(i) for i in range(len(many))]


def test_a_label_that_no_picture_reaches_is_told(gateway: RecordingGateway, run: Run, many: list[Path]) -> None:
    gateway.labels = False
    assert run("classify", many[0], "--threshold", 0.9) == (0, f"{many[0]}: no label of at least 90.0%\n", "")


@pytest.mark.parametrize("command", ["classify", "embed"])
def test_a_file_of_another_kind_is_told_before_anything_is_sent(
    gateway: RecordingGateway, run: Run, many: list[Path], tmp_path: Path, command: str
) -> None:
    other = tmp_path / "notes.txt"
    other.write_bytes(b"milk, eggs")
    code, out, err = run(command, *many, other)
    assert (code, out, gateway.requests) == (2, "", [])
    assert err == f"imagemesh: {other} must be a PNG, JPEG or WebP file, got b'milk, eggs'\n"


def test_an_empty_file_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    code, _, err = run("classify", tmp_path / "a.png")
    assert (code, err) == (2, f"imagemesh: {tmp_path}/a.png must be a PNG, JPEG or WebP file, got 'an empty file'\n")


def test_a_torn_picture_among_others_is_told_by_its_file(run: Run, many: list[Path], tmp_path: Path) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(png(1)[:50])
    code, out, err = run("classify", *many[:70], torn, *many[70:])
    assert (code, out) == (2, "")
    assert err.startswith(f"imagemesh: {torn} must be a whole PNG, JPEG, WEBP file, got b'")


def test_a_missing_file_and_a_folder_are_told(gateway: RecordingGateway, run: Run, tmp_path: Path) -> None:
    assert f"no such file: {tmp_path}/a.png" in run("classify", tmp_path / "a.png")[2]
    assert f"this is a folder: {tmp_path}" in run("embed", tmp_path)[2]
    assert gateway.requests == []


def test_a_file_that_cannot_be_read_is_told(gateway: RecordingGateway, run: Run) -> None:
    code, out, err = run("classify", "/proc/self/mem")  # its first page is never mapped
    assert (code, out, gateway.requests) == (1, "", [])
    assert err == "imagemesh: /proc/self/mem: Input/output error\n"


def test_what_is_not_about_a_picture_is_told_as_it_is(gateway: RecordingGateway, run: Run, many: list[Path]) -> None:
    gateway.error = NotFound("model", "vit", ["vit-tiny"])
    code, out, err = run("classify", *many, "--model", "vit")
    assert (code, out, err) == (2, "", f"imagemesh: {gateway.error}\n")


def test_a_bar_counts_the_pictures_on_a_terminal(gateway: RecordingGateway, many: list[Path]) -> None:
    terminal, end = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = start("classify", *many, "--server", gateway.address, stderr=end, env=environment)
    os.close(end)
    out, _ = process.communicate(timeout=60)
    shown = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert (process.returncode, len(out.splitlines())) == (0, 2 * len(many))
    assert b"classifying" in shown
    assert b"/150" in shown
