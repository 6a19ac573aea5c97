"""Pictures as that API brings them: base64, fitted to the size asked for, holes filled."""

import base64
import binascii
import io

import numpy as np
from PIL import Image, ImageOps

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import FORMATS, decode_file
from imagemesh_runtime.limits import MAX_SIDE
from imagemesh_runtime.tensors import Array

LANCZOS = Image.Resampling.LANCZOS


def file_of(text: object, field: str) -> bytes:
    """The file behind base64 or a ``data:`` URL.

    Raises:
        InvalidArgument: it is neither.
    """
    if not isinstance(text, str) or not text:
        raise InvalidArgument(field, text, "a picture in base64")
    head, comma, data = text.partition(",")
    try:
        return base64.b64decode(data if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(field, text, "a picture in base64") from error


def picture_of(text: object, field: str) -> Image.Image:
    """The picture behind base64.

    Raises:
        InvalidArgument: there is none.
    """
    return Image.fromarray(decode_file(file_of(text, field), field))


def mask_of(text: object, field: str) -> Image.Image:
    """The mask behind base64, bright where to redraw: its alpha where it has some, as that API reads it.

    Raises:
        InvalidArgument: there is none.
    """
    flat = picture_of(text, field)  # within all bounds
    with Image.open(io.BytesIO(file_of(text, field)), formats=FORMATS) as picture:
        if not picture.has_transparency_data:
            return flat
        alpha = ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        return flat
    return alpha.point(lambda value: 255 if value > 128 else 0).convert("RGB")


def bounded(picture: Image.Image) -> Image.Image:
    """The picture, made smaller where a side is longer than any that is drawn."""
    if max(picture.size) <= MAX_SIDE:
        return picture
    scale = MAX_SIDE / max(picture.size)
    return picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)), LANCZOS)


def png_of(picture: Image.Image) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def in_base64(file: bytes) -> str:
    """The file as JSON has it."""
    return base64.b64encode(file).decode()


def fitted(picture: Image.Image, width: int, height: int, mode: int) -> Image.Image:
    """Brought to a size: 0 stretched, 1 cropped in the middle, 2 whole, its edges drawn out into what is left."""
    if mode == 0:
        return picture.resize((width, height), LANCZOS)
    if mode == 1:  # cropped first: scaled whole, a strip would be thousands of times as large as what is left of it
        return ImageOps.fit(picture, (width, height), LANCZOS)
    scale = min(width / picture.width, height / picture.height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    resized = picture.resize(size, LANCZOS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    pads = ((top, height - size[1] - top), (left, width - size[0] - left), (0, 0))
    return Image.fromarray(np.pad(np.asarray(resized.convert("RGB")), pads, mode="edge"))


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with what the mask marks (at least half of white) replaced by the colours around it.

    Pull and push: averages of what is known on ever coarser grids, and from the coarsest back into the holes of the
    next finer one (Gortler et al., The Lumigraph, 1996).
    """
    hole = np.asarray(mask.convert("L").resize(picture.size, Image.Resampling.BILINEAR)) >= 128
    if hole.all() or not hole.any():
        return picture
    pixels = np.asarray(picture.convert("RGB"))
    levels = [(pixels, ~hole)]
    while max(levels[-1][1].shape) > 1 and not levels[-1][1].all():
        levels.append(_coarser(*levels[-1]))
    colours = levels[-1][0]
    for known_colours, known in reversed(levels[1:-1]):
        colours = np.where(known[..., None], known_colours, _finer(colours, known.shape))
    # The finest level, by far the largest, is never floats.
    around = _finer(np.clip(np.rint(colours), 0, 255).astype(np.uint8), hole.shape)
    return Image.fromarray(np.where(hole[..., None], around, pixels))


def _coarser(colours: Array, known: Array) -> tuple[Array, Array]:
    """A quarter of the cells, each the mean of those of its four that are known, and whether one is.

    Args:
        colours: [height, width, 3].
        known: bool [height, width].
    """
    height, width = ((side + 1) // 2 for side in known.shape)
    summed, count = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        mine = known[row::2, column::2]
        summed[: mine.shape[0], : mine.shape[1]] += colours[row::2, column::2] * mine[..., None]
        count[: mine.shape[0], : mine.shape[1]] += mine
    summed /= np.maximum(count, 1)[..., None]
    return summed, count > 0


def _finer(colours: Array, shape: tuple[int, ...]) -> Array:
    """Every cell as four, as many as there are on the finer grid of [height, width]."""
    finer: Array = colours.repeat(2, axis=0).repeat(2, axis=1)[: shape[0], : shape[1]]
    return finer
