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

_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def as_list(images: ImageInput | Iterable[ImageInput]) -> list[ImageInput]:
    """The pictures of an argument that takes one or many."""
    if isinstance(images, bytes | str | os.PathLike | Image.Image | np.ndarray):
        return [images]
    return list(images)


def image_to_proto(image: ImageInput, field: str) -> image_pb2.Image:
    """Read and encode a picture; ``field`` names it in errors.

    Raises:
        InvalidArgument: an array that is no picture.
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
    return image_pb2.Image(encoded=Path(image).read_bytes())


def _from_pillow(picture: Image.Image) -> image_pb2.Image:
    """Pixels where that loses nothing; else a PNG, so that transparency and depth are treated as a file's are."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "RGB" and not upright.has_transparency_data:
        return image_pb2.Image(pixels=to_proto(np.asarray(upright)))
    file = io.BytesIO()
    upright = upright if upright.mode in _PNG_MODES else upright.convert("RGB")
    upright.save(file, "PNG", compress_level=1)
    return image_pb2.Image(encoded=file.getvalue())
