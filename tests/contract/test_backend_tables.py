"""Every room's table of backends keeps the same rules."""

from pathlib import Path

import pytest

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import choose_backend
from imagemesh_services.controlnet import backend as controlnet
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.diffusion import backend as diffusion
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.text_encoder import backend as text_encoder
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.vae import backend as vae
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vit import backend as vit
from imagemesh_services.vit.config import VitConfig
from tests.support.backends import open_backend

ROOMS = [
    (text_encoder.BACKENDS, TextEncoderConfig, {"tiny-sd"}),
    (diffusion.BACKENDS, DiffusionConfig, {"tiny-sd"}),
    (vae.BACKENDS, VaeConfig, {"tiny-sd"}),
    (controlnet.BACKENDS, ControlNetConfig, {"tiny-controlnet"}),
    (vit.BACKENDS, VitConfig, {"tiny-vit"}),
]
rooms = pytest.mark.parametrize(("table", "config", "names"), ROOMS, ids=[config.SERVICE for _, config, _ in ROOMS])


@rooms
def test_auto_never_picks_the_fake(table, config, names):
    assert choose_backend(table, "auto").name == "torch"


@rooms
def test_unknown_backend_is_refused_and_the_error_lists_what_exists(table, config, names):
    with pytest.raises(InvalidArgument, match=", ".join(table)):
        choose_backend(table, "paper")


@rooms
def test_every_backend_is_named_as_its_row(table, config, names, models: Path):
    assert all(open_backend(table, name, config, models).name == name for name in table)


@rooms
def test_cards_list_the_models_of_the_role_and_no_others(table, config, names, models: Path):
    assert set(open_backend(table, "torch", config, models).cards()) == names


@rooms
def test_cards_carry_their_own_names(table, config, names, models: Path):
    for backend in (open_backend(table, name, config, models) for name in table):
        assert all(card.name == name for name, card in backend.cards().items())
