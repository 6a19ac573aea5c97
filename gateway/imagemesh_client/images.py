"""Pictures in whatever form the caller has them, on their way to the mesh."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from imagemesh.v1 import image_pb2
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array, to_proto

# A PNG, JPEG or WebP file's bytes or path, a picture of Pillow's, or uint8 [height, width, 3] in RGB.
ImageInput: TypeAlias = bytes | str | os.PathLike[str] | Image.Image | Array

FORMATS = "a PNG, JPEG or WebP file"

_MARK = 16  # bytes of a file that tell its format
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def as_list(images: ImageInput | Iterable[ImageInput]) -> list[ImageInput]:
    """The pictures of an argument that takes one or many."""
    if isinstance(images, bytes | str | os.PathLike | Image.Image | np.ndarray):
        return [images]
    return list(images)


def image_to_proto(image: ImageInput, field: str) -> image_pb2.Image:
    """Read and encode a picture; ``field`` names it in errors.

    Raises:
        InvalidArgument: an array that is no picture, or a file of another kind, which is named.
        OSError: the file can't be read.
    """
    if isinstance(image, bytes):
        return image_pb2.Image(encoded=image)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InvalidArgument(field, f"{image.dtype} {list(image.shape)}", "uint8 [height, width, 3]")
        return image_pb2.Image(pixels=to_proto(image))
    data = _read(Path(image))
    if not _begins_a_picture(data):
        raise InvalidArgument(field, os.fspath(image), FORMATS)
    return image_pb2.Image(encoded=data)


def check_picture_file(path: Path) -> None:
    """Look at a file's first bytes.

    Raises:
        InvalidArgument: it begins as no picture does; the error names the file.
        OSError: it can't be read.
    """
    start = _read(path, _MARK)
    if not _begins_a_picture(start):
        raise InvalidArgument(str(path), start or "an empty file", FORMATS)


def _read(path: Path, most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        if error.filename is None:  # a file that was opened no longer tells its name
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def _begins_a_picture(data: bytes) -> bool:
    return data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP")


def _from_pillow(picture: Image.Image) -> image_pb2.Image:
    """Pixels where that loses nothing; else a PNG, so that transparency and depth are treated as a file's are."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "RGB" and not upright.has_transparency_data:
        return image_pb2.Image(pixels=to_proto(np.asarray(upright)))
    file = io.BytesIO()
    upright = upright if upright.mode in _PNG_MODES else upright.convert("RGB")
    upright.save(file, "PNG", compress_level=1)
    return image_pb2.Image(encoded=file.getvalue())
