"""A model's folder in any format that the Hub has gives the same logits, and no pickle runs."""

import json
import logging
import pickle
from pathlib import Path

import h5py
import ml_dtypes
import msgpack
import numpy as np
import pytest
import torch

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_services.vit.backend import BACKENDS, Wanted
from imagemesh_services.vit.backends.torch import TorchVit
from imagemesh_services.vit.backends.torch.flax_files import read as read_flax
from imagemesh_services.vit.backends.torch.tensorflow_files import read as read_tensorflow
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.weights import find_weights
from tests.support import foreign_weights as foreign
from tests.support.backends import open_backend
from tests.support.tiny_vision import BUILDERS

CLOSE = 1e-4
# The architectures that transformers had in Flax and in TensorFlow.
FLAX = ("vit", "dinov2", "resnet")
TENSORFLOW = ("vit", "deit", "swin", "convnext", "resnet")
CASES = [
    *((name, "flax", foreign.write_flax) for name in FLAX),
    *((name, "tensorflow", foreign.write_tensorflow) for name in TENSORFLOW),
    ("vit", "pytorch", foreign.write_pytorch),
    ("vit", "pytorch", foreign.write_pytorch_shards),
]
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)


def unsafe(models: Path) -> TorchVit:
    return TorchVit(VitConfig(models=str(models), device="cpu", threads=2, unsafe_pickles=True))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for name in sorted({*FLAX, *TENSORFLOW}):
        BUILDERS[name](root / name)
    return root


@pytest.mark.parametrize(("name", "format", "write"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_every_format_gives_the_logits_of_the_safetensors(originals, tmp_path, caplog, name, format, write):
    foreign.with_weights(originals / name, tmp_path / "other", write)
    backend = unsafe(tmp_path)
    assert backend.cards()["other"].properties["format"] == format
    with caplog.at_level(logging.INFO):
        model, original = backend.load("other"), unsafe(originals).load(name)
    assert f"({format})" in caplog.text
    pixels = np.stack([original.preprocess(picture) for picture in PICTURES])
    wanted = original.classify(pixels)
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(model.classify(pixels), wanted, atol=CLOSE)
    if name != "resnet":
        layers = Wanted(original.poolings[0], (0,))
        np.testing.assert_allclose(
            model.embed(pixels, layers).hidden_states, original.embed(pixels, layers).hidden_states, atol=CLOSE
        )


def test_a_folder_of_several_formats_uses_the_safest(originals, tmp_path):
    folder = foreign.with_weights(originals / "vit", tmp_path / "both", foreign.write_pytorch)
    foreign.write_flax(foreign.load_file(originals / "vit" / "model.safetensors"), folder)
    assert unsafe(tmp_path).cards()["both"].properties["format"] == "flax"


class Mark:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def hostile(originals: Path, tmp_path: Path) -> Path:
    """A folder whose pickle leaves a mark; answers where the mark would be."""
    mark = tmp_path / "mark"
    foreign.with_weights(originals / "vit", tmp_path / "models" / "hostile", lambda arrays, folder: None)
    with (tmp_path / "models" / "hostile" / "pytorch_model.bin").open("wb") as file:
        torch.save({"vit.layernorm.bias": Mark(mark)}, file)
    return mark


def test_the_hostile_pickle_would_leave_its_mark(hostile):
    pickle.loads(pickle.dumps(Mark(hostile)))
    assert hostile.exists()


def test_a_pickle_is_refused_without_the_flag_and_never_opened(hostile):
    backend = open_backend(BACKENDS, "torch", VitConfig, hostile.parent / "models")
    assert "format" not in backend.cards()["hostile"].properties
    with pytest.raises(FailedPrecondition, match=r"only as a PyTorch pickle.*unsafe_pickles"):
        backend.load("hostile")
    assert not hostile.exists()


def test_a_pickle_of_more_than_weights_is_refused_with_the_flag_as_well(hostile):
    with pytest.raises(FailedPrecondition, match=r"pytorch_model\.bin holds more than weights"):
        unsafe(hostile.parent / "models").load("hostile")
    assert not hostile.exists()


TORN = {
    "flax_model.msgpack": b"\x81\xa3vit\xc7",
    "tf_model.h5": b"\x89HDF\r\n\x1a\nbut no more",
    "pytorch_model.bin": b"PK\x03\x04",
    "pytorch_model.bin.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}',
}


@pytest.mark.parametrize(("name", "content"), TORN.items())
def test_a_torn_file_is_named(originals, tmp_path, name, content):
    folder = foreign.with_weights(originals / "vit", tmp_path / "torn", lambda arrays, folder: None)
    (folder / name).write_bytes(content)
    with pytest.raises(FailedPrecondition, match=f"{name.replace('.', '[.]')} can't be read"):
        unsafe(tmp_path).load("torn")


def test_a_folder_without_weights_is_told_what_is_read(originals, tmp_path):
    foreign.with_weights(originals / "vit", tmp_path / "empty", lambda arrays, folder: None)
    with pytest.raises(FailedPrecondition, match=r"model\.safetensors, flax_model\.msgpack, tf_model\.h5"):
        open_backend(BACKENDS, "torch", VitConfig, tmp_path).load("empty")


def test_a_half_copied_folder_hides_no_other_and_is_told_what_it_lacks(originals, tmp_path):
    torn = foreign.with_weights(originals / "vit", tmp_path / "a-torn", foreign.write_pytorch_shards)
    index = json.loads((torn / "pytorch_model.bin.index.json").read_text())
    (torn / next(iter(index["weight_map"].values()))).unlink()
    foreign.with_weights(originals / "vit", tmp_path / "whole", foreign.write_pytorch)
    cards = unsafe(tmp_path).cards()
    assert {name: card.properties.get("format") for name, card in cards.items()} == {"a-torn": None, "whole": "pytorch"}
    with pytest.raises(FailedPrecondition, match=r"pytorch_model\.bin\.index\.json can't be read"):
        unsafe(tmp_path).load("a-torn")


@pytest.mark.parametrize("kind", ["external", "virtual"])
def test_a_tensorflow_file_that_refers_to_others_is_refused(tmp_path, kind):
    (tmp_path / "secret").write_bytes(bytes(16))
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        if kind == "external":
            file.create_dataset("kernel", (4,), "float32", external=[(str(tmp_path / "secret"), 0, 16)])
        else:
            layout = h5py.VirtualLayout((4,), "float32")
            layout[:] = h5py.VirtualSource(tmp_path / "secret", "numbers", (4,))
            file.create_virtual_dataset("kernel", layout)
    with pytest.raises(ValueError, match="kernel are in other files"):
        read_tensorflow(tmp_path / "tf_model.h5")


def test_flax_arrays_in_chunks_and_in_bfloat16_are_read(tmp_path):
    whole = np.arange(6, dtype=np.float32)
    half = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    chunks = {"0": whole[:4], "1": whole[4:]}
    tree = {
        "norm": {"scale": {"__msgpack_chunked_array__": True, "shape": {"0": 6}, "chunks": chunks}},
        "head": {"kernel": half},
    }
    (tmp_path / "f.msgpack").write_bytes(msgpack.packb(tree, default=foreign._extension, strict_types=True))
    found = read_flax(tmp_path / "f.msgpack")
    np.testing.assert_array_equal(found["norm.weight"], whole)
    np.testing.assert_array_equal(found["head.weight"], half.T)


def test_safetensors_are_preferred_over_all(originals):
    found = find_weights(originals / "vit", ["safetensors", "flax"])
    assert found is not None
    assert (found.format, found.files) == ("safetensors", (originals / "vit" / "model.safetensors",))
