"""What a generation starts from, and whether a second pass follows: checked, with every default filled in."""

from dataclasses import dataclass
from typing import Final

from PIL import Image

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2
from imagemesh_gateway.mesh import ModelInfo
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import (
    MAX_HIRES_SCALE,
    MAX_MASK_BLUR,
    MAX_SIDE,
    MAX_STEPS,
    check_pixels,
    check_range,
    check_size,
)

# diffusers' own, as is 1 with a mask.
DEFAULT_STRENGTH = 0.8
# AUTOMATIC1111's.
DEFAULT_HIRES_STRENGTH = 0.7
# Of latents, by torch's names; of decoded pictures, by Pillow's.
LATENT_UPSCALERS: Final = {
    "Latent": "bilinear",
    "Latent (nearest)": "nearest",
    "Latent (nearest-exact)": "nearest-exact",
    "Latent (bicubic)": "bicubic",
}
PICTURE_UPSCALERS: Final = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Bicubic": Image.Resampling.BICUBIC,
    "Bilinear": Image.Resampling.BILINEAR,
    "Nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class ImagePlan:
    """A picture to start from (not decoded yet), and what of it is redrawn."""

    image: image_pb2.Image
    strength: float
    # None: all of it.
    mask: image_pb2.Image | None
    invert_mask: bool
    mask_blur: int
    keep_unmasked: bool
    # Pixels around the masked part that is redrawn by itself; None: the whole picture is.
    padding: int | None = None


@dataclass(frozen=True)
class HiresPlan:
    """The second pass."""

    width: int
    height: int
    upscaler: str
    steps: int
    strength: float
    scheduler: str


def image_plan(request: pb.GenerateRequest, steps: int, model: ModelInfo) -> ImagePlan | None:
    """What to start from.

    Raises:
        InvalidArgument: a value isn't allowed, or the model needs another mode.
    """
    needs_mask = model.properties.get("needs") == "mask"
    if needs_mask and not request.HasField("mask"):
        raise InvalidArgument("mask", None, f"a picture: {model.name} is made for inpainting")
    if not request.HasField("image"):
        for name in ("mask", "strength", "mask_padding"):
            if request.HasField(name):
                raise InvalidArgument("image", None, f"a picture, since {name} is given")
        return None
    masked = request.HasField("mask")
    strength = request.strength if request.HasField("strength") else (1.0 if masked else DEFAULT_STRENGTH)
    _check_strength("strength", strength, steps)
    if request.HasField("mask_padding"):
        check_range("mask_padding", request.mask_padding, 0, MAX_SIDE)
        if not masked:
            raise InvalidArgument("mask_padding", request.mask_padding, "absent where there is no mask")
    check_range("mask_blur", request.mask_blur, 0, MAX_MASK_BLUR)
    return ImagePlan(
        image=request.image,
        strength=strength,
        mask=request.mask if masked else None,
        invert_mask=request.invert_mask,
        mask_blur=request.mask_blur,
        keep_unmasked=request.keep_unmasked,
        padding=request.mask_padding if request.HasField("mask_padding") else None,
    )


def hires_plan(request: pb.GenerateRequest, width: int, height: int, steps: int, multiple: int) -> HiresPlan | None:
    """The second pass after one at ``width`` x ``height`` in ``steps``, if there is to be one.

    Raises:
        InvalidArgument: a value isn't allowed.
    """
    if not request.HasField("hires"):
        return None
    asked = request.hires
    if request.HasField("image"):
        raise InvalidArgument("hires", "a second pass", "absent where an image is given")
    upscaler = asked.upscaler or next(iter(LATENT_UPSCALERS))
    if upscaler not in LATENT_UPSCALERS and upscaler not in PICTURE_UPSCALERS:
        raise InvalidArgument("hires.upscaler", upscaler, ", ".join([*LATENT_UPSCALERS, *PICTURE_UPSCALERS]))
    size = _hires_size(asked, width, height, multiple)
    count = len(request.seeds) or (request.num_images if request.HasField("num_images") else 1)
    check_pixels("hires", count, *size)
    steps = asked.steps if asked.HasField("steps") else steps
    check_range("hires.steps", steps, 1, MAX_STEPS)
    strength = asked.strength if asked.HasField("strength") else DEFAULT_HIRES_STRENGTH
    _check_strength("hires.strength", strength, steps)
    return HiresPlan(*size, upscaler, steps, strength, asked.scheduler or request.scheduler)


def _hires_size(asked: pb.GenerateHires, width: int, height: int, multiple: int) -> tuple[int, int]:
    if not (asked.scale or asked.width or asked.height):
        allowed = f"above 1, and at most {MAX_HIRES_SCALE:g}, or else hires.width and hires.height given"
        raise InvalidArgument("hires.scale", None, allowed)
    if not asked.scale:
        size = (asked.width, asked.height)
    elif asked.width or asked.height:
        raise InvalidArgument("hires.scale", asked.scale, "absent where hires.width and hires.height are given")
    elif not 1 < asked.scale <= MAX_HIRES_SCALE:
        raise InvalidArgument("hires.scale", asked.scale, f"above 1, and at most {MAX_HIRES_SCALE:g}")
    else:
        size = (int(width * asked.scale) // multiple * multiple, int(height * asked.scale) // multiple * multiple)
    for name, side in zip(("width", "height"), size, strict=True):
        check_size(f"hires.{name}", side, multiple)
    return size


def _check_strength(field: str, strength: float, steps: int) -> None:
    if not 0 < strength <= 1:
        raise InvalidArgument(field, strength, "above 0, and at most 1")
    if int(steps * strength) < 1:
        raise InvalidArgument(field, strength, f"at least {1 / steps:g}, so that one of {steps} steps is done")
