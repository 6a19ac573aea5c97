"""Pictures of any shape are fitted without being blown up on the way, and masks are read as that API reads them."""

import asyncio
import base64
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from imagemesh.v1 import gateway_service_pb2
from imagemesh_gateway.http_openai_body import _mask
from imagemesh_gateway.sdapi import extras
from imagemesh_gateway.sdapi.bodies import Img2ImgBody
from imagemesh_gateway.sdapi.pictures import bounded, filled, fitted, mask_of
from imagemesh_gateway.sdapi.translate import _add_pictures
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import decode


def png(picture: Image.Image, orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    picture.save(file, format="PNG", exif=exif)
    return file.getvalue()


def half(alpha: bool) -> Image.Image:
    """8 wide, 4 high, its left half 0 and the rest 255: in its alpha over white, or else in all colours."""
    pixels = np.full((4, 8, 4), 255, np.uint8)
    pixels[:, :4, 3 if alpha else slice(0, 3)] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000)])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_strip_is_fitted(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mode: int) -> None:
    made: list[int] = []
    resize = Image.Image.resize

    def watched(picture: Image.Image, size: tuple[int, int], *args: object, **named: object) -> Image.Image:
        made.append(size[0] * size[1])
        assert made[-1] <= 512 * 512
        return resize(picture, size, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert fitted(Image.new("RGB", size, "red"), 512, 512, mode).size == (512, 512)
    assert made


def test_the_middle_of_a_wide_picture_stays() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    assert (np.asarray(fitted(Image.fromarray(pixels), 32, 32, mode=1)) == 255).all()


@pytest.mark.parametrize("alpha", [True, False])
def test_a_mask_is_its_alpha_where_it_has_some(alpha: bool) -> None:
    mask = np.asarray(mask_of(base64.b64encode(png(half(alpha))).decode(), "mask"))
    assert mask.shape == (4, 8, 3)
    assert (mask[:, :4] == 0).all()
    assert (mask[:, 4:] == 255).all()


def test_masks_are_turned_as_pictures_are() -> None:
    turned = png(half(alpha=True), orientation=6)  # a quarter to the right: the left half is above
    mask = np.asarray(mask_of(base64.b64encode(turned).decode(), "mask").convert("L"))
    theirs = np.asarray(Image.open(io.BytesIO(_mask(turned, None) or b"")))
    for one in (mask, 255 - theirs):
        assert one.shape == (8, 4)
        assert (one[:4] == 0).all()
        assert (one[4:] == 255).all()


def test_a_picture_larger_than_any_drawn_is_made_smaller() -> None:
    assert bounded(Image.new("RGB", (8192, 1024))).size == (4096, 512)
    assert bounded(Image.new("RGB", (65_000, 1))).size == (4096, 1)
    small = Image.new("RGB", (64, 64))
    assert bounded(small) is small


def test_what_img2img_hands_on_is_no_larger_than_what_is_drawn() -> None:
    large = base64.b64encode(png(Image.new("L", (8192, 16), 255))).decode()
    request = gateway_service_pb2.GenerateRequest()
    _add_pictures(request, Img2ImgBody(init_images=[large], mask=large))
    assert decode(request.image, "image").shape == decode(request.mask, "mask").shape == (8, 4096, 3)


@pytest.mark.parametrize("asked", [{"upscaler_1": "Nearest", "upscaling_resize": 8}, {"upscaling_resize": 0.5}])
def test_the_pictures_of_a_request_are_bounded_together(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, object]
) -> None:
    monkeypatch.setattr(extras, "MAX_REQUEST_PIXELS", 8 * 8 * (64 if "upscaler_1" in asked else 1))
    body = extras.ExtrasBody.model_validate(asked)
    one = (base64.b64encode(png(Image.new("RGB", (8, 8)))).decode(), "image")
    assert len(asyncio.run(extras.resized(body, [one]))) == 1
    with pytest.raises(InvalidArgument, match="pixels in all"):
        asyncio.run(extras.resized(body, [one, one]))


def test_holes_take_the_colours_around_them() -> None:
    pixels = np.zeros((37, 53, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:] = (200, 30, 7), (10, 20, 250)
    hole = np.zeros((37, 53), np.uint8)
    hole[5:30, 2:12] = hole[11:35, 41:53] = 255
    torn = np.where(hole[..., None] > 0, 128, pixels).astype(np.uint8)
    made = np.asarray(filled(Image.fromarray(torn), Image.fromarray(hole)))
    np.testing.assert_array_equal(made[hole == 0], pixels[hole == 0])
    assert (np.abs(made.astype(int) - pixels).max(axis=-1)[hole > 0] <= 80).all()
    assert (np.median(made[5:30, 2:12], axis=(0, 1)) == (200, 30, 7)).all()
    assert (np.median(made[11:35, 41:], axis=(0, 1)) == (10, 20, 250)).all()


def test_filling_holes_takes_less_than_two_pictures_in_floats() -> None:
    side = 512
    picture, mask = Image.new("RGB", (side, side), "red"), Image.new("L", (side, side), 0)
    mask.paste(255, (0, 0, side, side - 1))
    tracemalloc.start()
    try:
        made = filled(picture, mask)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.getpixel((3, 3)) == (255, 0, 0)
    assert peak < 2 * 3 * 4 * side * side
