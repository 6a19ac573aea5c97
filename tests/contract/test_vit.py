"""What every ViT backend promises at its seam."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imagemesh_services.vit.backend import BACKENDS, Pooling, VitModel, Wanted
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.graph import GraphVitModel
from tests.support.backends import load_first
from tests.support.graphs import build_graph

GRAPHS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def graphs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with tiny-vit as a graph."""
    root = tmp_path_factory.mktemp("graphs")
    build_graph(models, "tiny-vit", root / "tiny-vit")
    return root


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest, models: Path) -> VitModel:
    folder = request.getfixturevalue("graphs") if request.param in GRAPHS else models
    return load_first(BACKENDS, request.param, VitConfig, folder)


@pytest.fixture
def pixels(model) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    # Pictures of noise are nearly alike to the fake, which averages them.
    return np.stack([model.preprocess(image // (i + 1)) for i, image in enumerate(noise)])


def everything(model: VitModel, pooling: Pooling) -> Wanted:
    return Wanted(pooling, tuple(range(len(model.states))))


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (1, 2000), (37, 91)])
def test_pictures_of_every_size_are_preprocessed_to_one_shape(model, size):
    image = np.full((*size, 3), 128, np.uint8)
    image.flags.writeable = False
    pixels = model.preprocess(image)
    assert pixels.dtype == np.float32
    assert pixels.shape == model.preprocess(np.zeros((64, 64, 3), np.uint8)).shape
    assert len(pixels) == 3


def test_preprocessing_from_many_threads_gives_the_same(model):
    images = np.random.default_rng(1).integers(0, 256, (32, 40, 50, 3), dtype=np.uint8)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(model.preprocess, images))
    np.testing.assert_array_equal(together, [model.preprocess(image) for image in images])


def test_labels_are_distinct_words(model):
    assert all(isinstance(label, str) and label for label in model.labels)
    assert len(set(model.labels)) == len(model.labels)


def test_logits_are_finite_a_column_a_label(model, pixels):
    logits = model.classify(pixels)
    assert logits.dtype == np.float32
    assert logits.shape == (4, len(model.labels))
    assert np.isfinite(logits).all()


def test_other_pictures_give_other_logits(model, pixels):
    logits = model.classify(pixels)
    assert np.abs(logits[0] - logits[3]).max() > 1e-2


@pytest.mark.parametrize("pooling", Pooling)
def test_vectors_and_hidden_states_have_their_shapes(model, pixels, pooling):
    vectors, states, _ = model.embed(pixels, everything(model, pooling))
    assert vectors.dtype == states.dtype == np.float32
    assert vectors.shape == (4, model.width)
    assert states.shape == (4, len(model.states), *model.states[0])


@pytest.mark.parametrize("pooling", Pooling)
def test_hidden_states_come_only_when_asked_for_and_change_nothing(model, pixels, pooling):
    vectors, states, _ = model.embed(pixels, Wanted(pooling))
    assert states is None
    np.testing.assert_allclose(vectors, model.embed(pixels, everything(model, pooling)).vectors, atol=1e-6)


def test_poolings_differ(model, pixels):
    cls, mean = (model.embed(pixels, Wanted(pooling)).vectors for pooling in (Pooling.CLS, Pooling.MEAN))
    assert np.abs(cls - mean).max() > 1e-2


def test_the_same_pixels_give_the_same_answers(model, pixels):
    np.testing.assert_array_equal(model.classify(pixels), model.classify(pixels))
    first, second = (model.embed(pixels, Wanted(layers=(0, 1))) for _ in range(2))
    np.testing.assert_array_equal(first.vectors, second.vectors)
    np.testing.assert_array_equal(first.hidden_states, second.hidden_states)


def test_classified_batch_equals_singles(model, pixels):
    singles = np.concatenate([model.classify(row[None]) for row in pixels])
    np.testing.assert_allclose(model.classify(pixels), singles, atol=1e-4)


@pytest.mark.parametrize("pooling", Pooling)
def test_embedded_batch_equals_singles(model, pixels, pooling):
    batch = model.embed(pixels, everything(model, pooling))
    singles = [model.embed(row[None], everything(model, pooling)) for row in pixels]
    np.testing.assert_allclose(batch.vectors, np.concatenate([one.vectors for one in singles]), atol=1e-4)
    np.testing.assert_allclose(batch.hidden_states, np.concatenate([one.hidden_states for one in singles]), atol=1e-4)


def test_layers_come_in_the_order_asked_for(model, pixels):
    last = len(model.states) - 1
    states = model.embed(pixels, Wanted(layers=(last, 0))).hidden_states
    every = model.embed(pixels, Wanted(layers=tuple(range(last + 1)))).hidden_states
    np.testing.assert_allclose(states, every[:, [last, 0]], atol=1e-6)


def test_attention_is_a_share_of_each_patch_and_changes_nothing(model, pixels):
    plain = model.embed(pixels, Wanted())
    assert plain.attention is None
    if not model.rollout:  # the service refuses whoever asks
        assert isinstance(model, GraphVitModel), "only a graph may have none"
        assert model.embed(pixels, Wanted(attention=True)).attention is None
        return
    shown = model.embed(pixels, Wanted(attention=True))
    np.testing.assert_allclose(shown.vectors, plain.vectors, atol=1e-5)
    assert shown.attention.dtype == np.float32
    assert shown.attention.shape[0] == 4
    assert shown.attention[0].size == model.states[-1][0] - model.prefix
    assert (shown.attention >= 0).all()
    assert (shown.attention.sum(axis=(1, 2)) <= 1 + 1e-5).all()
