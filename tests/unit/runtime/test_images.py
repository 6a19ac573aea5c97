"""Pictures from outside: what each kind becomes, and that nothing hostile gets through."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagemesh.v1 import image_pb2, tensor_pb2
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import MAX_PIXELS, decode, decode_file
from imagemesh_runtime.tensors import to_proto

RED, WHITE = [255, 0, 0], [255, 255, 255]


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A greyscale PNG whose header says what we like."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_pixels_of_a_lossless_file_are_exact(format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_file(encoded(Image.fromarray(pixels), format, lossless=True), "f"), pixels)


def test_a_jpeg_is_decoded() -> None:
    pixels = decode_file(encoded(Image.new("RGB", (16, 8), (255, 0, 0)), "JPEG"), "f")
    assert pixels.shape == (8, 16, 3)
    assert np.abs(pixels.astype(int) - RED).max() < 8


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: show it clockwise
    pixels = decode_file(encoded(picture, exif=exif), "f")
    assert pixels.tolist() == [[RED], [[0, 0, 0]]]


def test_a_nonsensical_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert decode_file(encoded(Image.new("RGB", (2, 1)), exif=exif), "f").shape == (1, 2, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_unforeseen_error() -> None:
    data = encoded(Image.new("RGB", (2, 1)), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with suppress(InvalidArgument):
        assert decode_file(data, "f").shape == (1, 2, 3)


@pytest.mark.parametrize(("alpha", "want"), [(255, RED), (0, WHITE), (51, [255, 204, 204])])
def test_transparency_is_laid_over_white(alpha: int, want: list[int]) -> None:
    assert decode_file(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, alpha))), "f").tolist() == [[want]]


def test_grey_with_alpha_is_laid_over_white() -> None:
    assert decode_file(encoded(Image.new("LA", (1, 1), (0, 51))), "f").tolist() == [[[204, 204, 204]]]


def test_a_transparent_palette_entry_is_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    assert decode_file(encoded(picture, transparency=1), "f").tolist() == [[RED, WHITE]]


def test_a_transparent_colour_is_white() -> None:
    picture = Image.new("RGB", (2, 1), (255, 0, 0))
    picture.putpixel((1, 0), (0, 0, 9))
    assert decode_file(encoded(picture, transparency=(0, 0, 9)), "f").tolist() == [[RED, WHITE]]


def test_sixteen_bits_of_grey_keep_the_upper_eight() -> None:
    picture = Image.fromarray(np.array([[0, 0x00FF, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert decode_file(encoded(picture), "f")[0, :, 0].tolist() == [0, 0, 128, 255]


def test_black_and_white_is_decoded() -> None:
    assert decode_file(encoded(Image.new("1", (1, 1), 1)), "f").tolist() == [[WHITE]]


def test_a_cmyk_jpeg_has_its_colours() -> None:
    pixels = decode_file(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "f")
    assert np.abs(pixels.astype(int) - RED).max() < 8


GOOD = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
HOSTILE = {
    "empty": b"",
    "text": b"hello" * 100,
    "html": b"<html>" + b"x" * 1000,
    "a GIF": encoded(Image.new("RGB", (2, 2)), "GIF"),
    "a BMP": encoded(Image.new("RGB", (2, 2)), "BMP"),
    "only a signature": GOOD[:8],
    "truncated PNG": GOOD[: len(GOOD) // 2],
    "truncated JPEG": encoded(Image.open(io.BytesIO(GOOD)), "JPEG")[:700],
    "truncated WebP": encoded(Image.open(io.BytesIO(GOOD)), "WEBP")[:700],
    "PNG without pixels": png(4, 4),
    "no width": png(0, 5),
    "huge dimensions": png(2**31 - 1, 2**31 - 1),
    "one line too long": png(MAX_PIXELS + 1, 1),
    "between our bound and Pillow's": png(8192, 8193),
    "between Pillow's warning and its error": png(10_000, 10_000, b"\0" * 1000),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_of_ours_is_an_invalid_argument(data: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_file(data, "image")
    assert caught.value.field == "image"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [name for name in HOSTILE if "dimensions" in name or "between" in name])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_is_too_large_is_told_the_limit(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"at most {MAX_PIXELS} pixels"):
        decode_file(HOSTILE[name], "image")


def test_a_bomb_is_refused_also_where_warnings_are_errors() -> None:
    with pytest.raises(InvalidArgument), pytest.warns(Image.DecompressionBombWarning):
        decode_file(png(10_000, 10_000), "image")


@settings(max_examples=200, deadline=None)
@given(st.integers(8, len(GOOD) - 1), st.binary(min_size=1, max_size=20))
def test_a_damaged_file_is_a_picture_or_an_invalid_argument(at: int, noise: bytes) -> None:
    with suppress(InvalidArgument):
        assert decode_file(GOOD[:at] + noise + GOOD[at + len(noise) :], "f").shape[2] == 3


def test_pixels_are_taken_as_they_are() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(decode(image_pb2.Image(pixels=to_proto(pixels)), "image"), pixels)


@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 2), (0, 5, 3), (1, 2, 2, 3)])
def test_pixels_of_another_shape_name_the_field(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode(image_pb2.Image(pixels=to_proto(np.zeros(shape, dtype=np.uint8))), "image")
    assert caught.value.field == "image.pixels.shape"


def test_pixels_that_are_not_uint8_name_the_field() -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode(image_pb2.Image(pixels=tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FP32, shape=[1, 1, 3])), "image")
    assert caught.value.field == "image.pixels.dtype"


def test_no_picture_at_all_names_the_field() -> None:
    with pytest.raises(InvalidArgument, match="image must be a picture"):
        decode(image_pb2.Image(), "image")


def test_an_encoded_picture_names_its_field() -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode(image_pb2.Image(encoded=b"no"), "image")
    assert caught.value.field == "image.encoded"
