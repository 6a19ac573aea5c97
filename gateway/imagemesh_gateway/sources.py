"""The pictures that a generation starts from: brought to its size, masked, and laid over what was made of them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from imagemesh_gateway.modes import ImagePlan
from imagemesh_gateway.pictures import fit
from imagemesh_gateway.plan import Plan
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import decode
from imagemesh_runtime.tensors import Array

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Area:
    """The part of a picture that is redrawn by itself: where it is, the picture, and its soft mask ("L")."""

    box: Box
    picture: Image.Image
    mask: Image.Image


@dataclass(frozen=True)
class Sources:
    """What a generation starts from: the picture, uint8 [height, width, 3], and where it is redrawn.

    Attributes:
        mask: uint8 [height, width], 1 where it is redrawn, as diffusers' mask processor has it; None: everywhere.
        overlay: float32 [height, width, 1], how much of the original lies over the result, 0 to 1; None: nothing.
        area: what the result is a part of; None: of nothing larger.
    """

    image: Array
    mask: Array | None = None
    overlay: Array | None = None
    area: Area | None = None

    def without_masked(self) -> Array:
        """float32 [2, height, width, 3] in -1 to 1: the picture, and it with 0 where it is redrawn."""
        pixels = self.image.astype(np.float32) / np.float32(127.5) - np.float32(1)
        assert self.mask is not None
        return np.stack([pixels, pixels * (self.mask == 0)[..., None]])


def sources(plan: Plan, image: ImagePlan) -> Sources:
    """The request's pictures at the size of the generation.

    Raises:
        InvalidArgument: one isn't a picture, or the mask leaves nothing to redraw.
    """
    original = decode(image.image, "image")
    if image.mask is None:
        return Sources(fit(original, plan))
    drawn = decode(image.mask, "mask")
    if image.padding is not None:
        return _part(plan, image, image.padding, Image.fromarray(original), Image.fromarray(drawn))
    soft = np.asarray(_softened(Image.fromarray(fit(drawn, plan)), image), dtype=np.float32) / 255
    return Sources(fit(original, plan), _binary(soft), (1 - soft)[..., None] if image.keep_unmasked else None)


def lay_over(made: Array, source: Sources) -> Array:
    """The generation, uint8 [height, width, 3], with the original over it where nothing was to be redrawn."""
    if source.area is not None:
        return _paste_back(made, source.area)
    if source.overlay is None:
        return made
    mixed = made * (1 - source.overlay) + source.image * source.overlay
    return np.asarray(mixed.round(), dtype=np.uint8)


def crop_box(mask: Array, width: int, height: int, padding: int) -> Box:
    """What of a mask [h, w] isn't 0, padded, and grown to the proportions of width to height as far as there is room.

    As diffusers' ``VaeImageProcessor.get_crop_region``, which follows AUTOMATIC1111's.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom = max(rows[0] - padding, 0), min(rows[-1] + 1 + padding, mask.shape[0])
    left, right = max(columns[0] - padding, 0), min(columns[-1] + 1 + padding, mask.shape[1])
    if (right - left) / (bottom - top) > width / height:
        wanted = int((right - left) * height / width)
        top, bottom = _grown(int(top), int(bottom), wanted, mask.shape[0])
    else:
        wanted = int((bottom - top) * width / height)
        left, right = _grown(int(left), int(right), wanted, mask.shape[1])
    return int(left), int(top), int(right), int(bottom)


def _grown(start: int, end: int, wanted: int, limit: int) -> tuple[int, int]:
    more = wanted - (end - start)
    start, end = start - more // 2, end + more - more // 2
    if end >= limit:
        start, end = start - (end - limit), limit
    if start < 0:
        start, end = 0, end - start
    return start, min(end, limit)


def _part(plan: Plan, image: ImagePlan, padding: int, original: Image.Image, drawn: Image.Image) -> Sources:
    """Only the masked part, at the size of the generation."""
    if drawn.size != original.size:
        drawn = drawn.resize(original.size, Image.Resampling.LANCZOS)
    soft = _softened(drawn, image)
    if not np.asarray(soft).any():
        raise _nothing_to_do()
    box = crop_box(np.asarray(soft), plan.width, plan.height, padding)
    pixels = np.asarray(_filled(original.crop(box), plan.width, plan.height))
    mask = np.asarray(_filled(soft.crop(box), plan.width, plan.height).convert("L"), dtype=np.float32) / 255
    return Sources(pixels, _binary(mask), area=Area(box, original, soft))


def _softened(mask: Image.Image, image: ImagePlan) -> Image.Image:
    grey = mask.convert("L")
    if image.invert_mask:
        grey = ImageOps.invert(grey)
    return grey.filter(ImageFilter.GaussianBlur(image.mask_blur)) if image.mask_blur else grey


def _binary(soft: Array) -> Array:
    mask = (soft >= 0.5).astype(np.uint8)
    if not mask.any():
        raise _nothing_to_do()
    return mask


def _nothing_to_do() -> InvalidArgument:
    return InvalidArgument("mask", "a mask that is dark everywhere", "bright where the picture is to be redrawn")


def _filled(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture as large as fits into the size, in the middle, its edges drawn out over the rest."""
    wider = width / height >= picture.width / picture.height
    size = (picture.width * height // picture.height if wider else width,
            height if wider else picture.height * width // picture.width)  # fmt: skip
    resized = picture.resize(size, Image.Resampling.LANCZOS).convert("RGB")
    filled = Image.new("RGB", (width, height))
    left, top = width // 2 - size[0] // 2, height // 2 - size[1] // 2
    filled.paste(resized, (left, top))
    if top > 0:
        filled.paste(resized.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        filled.paste(resized.resize((width, top), box=(0, size[1], width, size[1])), (0, top + size[1]))
    elif left > 0:
        filled.paste(resized.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        filled.paste(resized.resize((left, height), box=(size[0], 0, size[0], height)), (left + size[0], 0))
    return filled


def _paste_back(made: Array, area: Area) -> Array:
    """The whole picture with the generation in its place, under the original as far as that is not masked."""
    left, top, right, bottom = area.box
    width, height = right - left, bottom - top
    picture = Image.fromarray(made)
    wider = width / height > picture.width / picture.height
    size = (width if wider else picture.width * height // picture.height,
            picture.height * width // picture.width if wider else height)  # fmt: skip
    part = Image.new("RGB", (width, height))
    part.paste(picture.resize(size, Image.Resampling.LANCZOS), (width // 2 - size[0] // 2, height // 2 - size[1] // 2))
    whole = Image.new("RGB", area.picture.size)
    whole.paste(part, (left, top))
    over = Image.new("RGBa", area.picture.size)
    over.paste(area.picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(area.mask))
    mixed = whole.convert("RGBA")
    mixed.alpha_composite(over.convert("RGBA"))
    return np.asarray(mixed.convert("RGB"))
