"""Pictures as files, made to order."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def scene(height: int = 40, width: int = 60) -> np.ndarray:
    """uint8 [height, width, 3]: gradients with a bright spot off the centre, so that every rotation is another."""
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    spot = 255 * np.exp(-40 * ((x - 0.25) ** 2 + (y - 0.3) ** 2))
    return np.stack([255 * x, 255 * y, spot], axis=-1).astype(np.uint8)


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated_jpeg(picture: np.ndarray) -> bytes:
    """A JPEG that lies on its side, with the EXIF orientation 6 to say so: turn it 90 degrees clockwise to look."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.rot90(picture), "JPEG", quality=95, subsampling=0, exif=exif)


def png_of_size(width: int, height: int) -> bytes:
    """A valid black 1-bit PNG of that size in a few kilobytes, whatever the size."""
    rows = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
