"""The UNet starts with the text encoder it knows, and learns mostly where the words decide."""

from argparse import Namespace
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from imagemesh_training import train_unet


def test_a_unet_goes_on_with_its_own_text_encoder_and_a_new_one_with_the_taught(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    shipped = tmp_path / "shipped"
    go_on = train_unet.parts_to_start_from(Namespace(work=tmp_path, init=shipped))
    assert go_on == (shipped / "unet", shipped / "text_encoder")
    assert train_unet.parts_to_start_from(Namespace(work=tmp_path, init=None)) == (None, tmp_path / "text_encoder")
    assert train_unet.parts_to_start_from(Namespace(work=tmp_path / "none", init=None)) == (None, None)


def test_noisier_timesteps_are_drawn_more_often() -> None:
    torch.manual_seed(0)
    drawn = train_unet.draw_timesteps(20000, 1000)
    assert int(drawn.max()) < 1000
    quarters = [int(((drawn >= low) & (drawn < low + 250)).sum()) for low in (0, 250, 500, 750)]
    assert quarters == sorted(quarters)
    assert quarters[3] > 6 * quarters[0]


def test_the_words_reach_the_picture_and_a_controlnet_copies_all_of_the_way_down() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**train_unet.UNET).eval()
    noisy, step = torch.randn(1, 16, 8, 8), torch.tensor([999])
    with torch.no_grad():
        one, other = (unet(noisy, step, torch.randn(1, 77, train_unet.WIDTH)).sample for _ in range(2))
    assert float((one - other).abs().max()) > 1e-4
    control = ControlNetModel.from_unet(unet)
    assert control.config.addition_embed_type_num_heads == unet.config.addition_embed_type_num_heads
