"""An IP-Adapter is in memory once, however many references, sets and generations use it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from imagemesh_runtime.errors import NotFound
from imagemesh_runtime.registry import Repository
from imagemesh_services.diffusion.backends.torch import adapters as module
from imagemesh_services.diffusion.backends.torch.adapters import Adapted, Adapters, as_added
from imagemesh_services.diffusion.references import Reference
from imagemesh_services.ip_adapters import find_adapters
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
    original = module.read_weights
    monkeypatch.setattr(module, "read_weights", lambda one: names.append(one.name) or original(one))
    return names


def prepared(adapters: Adapters, told: list[Reference]) -> Adapted:
    adapters.find([one.adapter for one in told])
    return adapters.prepare(told)


def reference(name: str, scale: float = 1.0) -> Reference:
    rng = np.random.default_rng(5)
    return Reference(name, scale, rng.normal(size=WIDTHS.get(name, (1, PROJECTED))).astype(np.float32))


def test_any_number_of_references_to_an_adapter_reads_it_once_and_copies_nothing(adapters, read):
    sets = [prepared(adapters, [reference("ip/plain")] * count) for count in (1, 2, 3, 4, 5, 8)]
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
    held = prepared(adapters, [reference("ip/plain")])
    for name in COPIES:
        prepared(adapters, [reference(name)])
    prepared(adapters, [reference("ip/plain")] * 2)
    with adapters.at_work(held):
        pass
    assert read == ["ip/plain", *COPIES]
    assert {one.adapter.name for one in adapters._fitted} == {"ip/plain", *COPIES[-3:]}
    prepared(adapters, [reference(COPIES[0])])
    assert read[-1] == COPIES[0]


@torch.inference_mode()
def test_composed_adapters_move_the_unet_as_diffusers_loading_of_them_all_does(adapters, unet):
    told = [reference("ip/plus", 0.7), reference("ip/plain", 0.4), reference("ip/plus", 1.3)]
    adapted = prepared(adapters, told)
    sample = torch.from_numpy(np.random.default_rng(1).normal(size=(1, unet.config.in_channels, 8, 8))).float()
    prompt = torch.ones(1, 4, unet.config.cross_attention_dim)
    given = {f"image_embeds.{i}": torch.from_numpy(one.positive)[None] for i, one in enumerate(told)}

    def forward() -> torch.Tensor:
        return unet(sample, 3, encoder_hidden_states=prompt, added_cond_kwargs=as_added(given)).sample

    with adapters.at_work(adapted):
        ours = forward()
    unet._load_ip_adapter_weights([module.read_weights(adapters._known[one.adapter]) for one in told])
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [one.scale for one in told]
    torch.testing.assert_close(ours, forward())


def test_adapters_that_count_differently_are_not_equal(adapters):
    one, other, same = (prepared(adapters, [reference("ip/plain", scale)]) for scale in (1.0, 0.5, 1.0))
    assert one == same != other
    assert adapters.prepare([]) == Adapted()


def test_a_file_that_was_replaced_is_other_weights_and_is_read_anew(adapters, root, read):
    path = root / f"{COPIES[0]}.safetensors"
    before, held = adapters.find([COPIES[0], "ip/plain"]), prepared(adapters, [reference(COPIES[0])])
    assert before[0] != before[1]  # of a name each
    weights = load_file(path)
    save_file({name: weight * 2 for name, weight in weights.items()}, path)
    os.utime(path, ns=(0, 0))
    after = adapters.find([COPIES[0], "ip/plain"])
    assert (after[0] == before[0], after[1] == before[1]) == (False, True)
    assert prepared(adapters, [reference(COPIES[0])]) != held
    assert read == [COPIES[0]] * 2
    shutil.copy(root / "ip" / "plain.safetensors", path)


def test_what_is_not_on_disk_is_not_found_and_the_lane_looks_for_nothing(adapters, root):
    with pytest.raises(NotFound, match="ip/plain"):
        adapters.find(["ip/nobody"])
    with pytest.raises(NotFound):
        adapters.prepare([reference("ip/plain")])
    gone = root / "ip" / "gone.safetensors"
    shutil.copy(root / "ip" / "plain.safetensors", gone)
    assert adapters.find(["ip/gone"])
    gone.unlink()
    with pytest.raises(NotFound):
        adapters.find(["ip/gone"])


@pytest.mark.parametrize("config", ["[]", "null", "{", "[" * 100_000, '{"projection_dim": [24]}'])
def test_one_malformed_folder_does_not_hide_the_others(root, tmp_path, config):
    shutil.copytree(root / "ip", tmp_path / "good")
    (tmp_path / "bad" / "image_encoder").mkdir(parents=True)
    (tmp_path / "bad" / "image_encoder" / "config.json").write_text(config)
    shutil.copy(root / "ip" / "plain.safetensors", tmp_path / "bad" / "plain.safetensors")
    save_file({"image_proj.proj.weight": torch.zeros(3)}, tmp_path / "good" / "flat.safetensors")
    found = find_adapters(Repository([tmp_path]))
    assert set(found) == {"good/plain", "good/plus", *(f"good/{one.removeprefix('ip/')}" for one in COPIES)}
