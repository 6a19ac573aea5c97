"""An IP-Adapter is in memory once, however many references, sets and generations use it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from imagemesh_runtime.registry import Repository
from imagemesh_services.diffusion.backends.torch import adapters as module
from imagemesh_services.diffusion.backends.torch.adapters import Adapted, Adapters, as_added
from imagemesh_services.diffusion.references import Reference
from tests.support.tiny_adapters import PROJECTED, WIDTH, build_adapters

COPIES = [f"ip/copy{i}" for i in range(6)]
WIDTHS = {"ip/plus": (1, 17, WIDTH)}


@pytest.fixture(scope="module")
def root(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fittings")
    build_adapters(root / "ip", models / "tiny-sd")
    for name in COPIES:
        shutil.copy(root / "ip" / "plain.safetensors", root / f"{name}.safetensors")
    return root


@pytest.fixture
def unet(models: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(models / "tiny-sd" / "unet").eval()


@pytest.fixture
def adapters(root: Path, unet: UNet2DConditionModel) -> Adapters:
    return Adapters("tiny-sd", unet, Repository([root]))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters whose files were read, in order."""
    names: list[str] = []
    original = module._weights
    monkeypatch.setattr(module, "_weights", lambda one: names.append(one.name) or original(one))
    return names


def reference(name: str, scale: float = 1.0) -> Reference:
    rng = np.random.default_rng(5)
    return Reference(name, scale, rng.normal(size=WIDTHS.get(name, (1, PROJECTED))).astype(np.float32))


def test_any_number_of_references_to_an_adapter_reads_it_once_and_copies_nothing(adapters, read):
    sets = [adapters.prepare([reference("ip/plain")] * count) for count in (1, 2, 3, 4, 5, 8)]
    assert read == ["ip/plain"]
    pointers = {
        weight.data_ptr()
        for one in sets
        for processor in one.fitting.processors.values()
        if hasattr(processor, "to_k_ip")
        for weight in processor.to_k_ip.parameters()
    }
    layers = sum(hasattr(one, "to_k_ip") for one in sets[0].fitting.processors.values())
    assert len(pointers) == layers > 0
    assert len({id(layer) for one in sets for layer in one.fitting.projection.image_projection_layers}) == 1


def test_what_a_generation_uses_is_never_read_again_and_the_rest_is_let_go(adapters, read):
    held = adapters.prepare([reference("ip/plain")])
    for name in COPIES:
        adapters.prepare([reference(name)])
    adapters.prepare([reference("ip/plain")] * 2)
    with adapters.at_work(held):
        pass
    assert read == ["ip/plain", *COPIES]
    assert set(adapters._fitted) == {"ip/plain", *COPIES[-3:]}
    adapters.prepare([reference(COPIES[0])])
    assert read[-1] == COPIES[0]


@torch.inference_mode()
def test_composed_adapters_move_the_unet_as_diffusers_loading_of_them_all_does(adapters, unet):
    told = [reference("ip/plus", 0.7), reference("ip/plain", 0.4), reference("ip/plus", 1.3)]
    adapted = adapters.prepare(told)
    sample = torch.from_numpy(np.random.default_rng(1).normal(size=(1, unet.config.in_channels, 8, 8))).float()
    prompt = torch.ones(1, 4, unet.config.cross_attention_dim)
    given = {f"image_embeds.{i}": torch.from_numpy(one.positive)[None] for i, one in enumerate(told)}

    def forward() -> torch.Tensor:
        return unet(sample, 3, encoder_hidden_states=prompt, added_cond_kwargs=as_added(given)).sample

    with adapters.at_work(adapted):
        ours = forward()
    unet._load_ip_adapter_weights([module._weights(adapters._known[one.adapter]) for one in told])
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [one.scale for one in told]
    torch.testing.assert_close(ours, forward())


def test_adapters_that_count_differently_are_not_equal(adapters):
    one, other, same = (adapters.prepare([reference("ip/plain", scale)]) for scale in (1.0, 0.5, 1.0))
    assert one == same != other
    assert adapters.prepare([]) == Adapted()
