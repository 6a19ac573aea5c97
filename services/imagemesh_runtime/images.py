"""Pictures from outside, decoded with bounds."""

import io

import numpy as np
from PIL import Image, ImageOps

from imagemesh.v1 import image_pb2
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array, from_proto

FORMATS = ("PNG", "JPEG", "WEBP")
# About 8192 x 8192: larger pictures are refused before a pixel of them is decoded.
MAX_PIXELS = 1 << 26


def decode(image: image_pb2.Image, field: str) -> Array:
    """The picture as uint8 [height, width, 3], RGB.

    Raises:
        InvalidArgument: no picture, not a picture, of a format or size that isn't allowed, or torn.
    """
    source = image.WhichOneof("source")
    if source is None:
        raise InvalidArgument(field, None, "a picture: encoded or pixels")
    if source == "encoded":
        return decode_file(image.encoded, f"{field}.encoded")
    pixels = from_proto(image.pixels, f"{field}.pixels", dtypes=["uint8"], shape=(None, None, 3))
    height, width = pixels.shape[:2]
    if not 0 < height * width <= MAX_PIXELS:
        raise InvalidArgument(f"{field}.pixels.shape", [height, width, 3], f"of 1 to {MAX_PIXELS} pixels")
    return pixels


def decode_file(data: bytes, field: str) -> Array:
    """A PNG, JPEG or WebP file as uint8 [height, width, 3], RGB; EXIF orientation applied, transparency over white."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height <= MAX_PIXELS:
            return np.asarray(_flat(ImageOps.exif_transpose(picture)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidArgument(field, "a decompression bomb", f"at most {MAX_PIXELS} pixels") from error
    except Exception as error:  # whatever Pillow's parsers trip over: OSError, ValueError, struct.error, KeyError...
        raise InvalidArgument(field, data, f"a whole {', '.join(FORMATS)} file") from error
    raise InvalidArgument(field, f"{picture.width}x{picture.height} pixels", f"at most {MAX_PIXELS} pixels")


def _flat(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")
