"""From that API's bodies to the mesh's requests."""

import asyncio
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from PIL import Image
from pydantic import ValidationError

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, priority_pb2
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.sdapi.bodies import GenerationBody, Img2ImgBody, Txt2ImgBody
from imagemesh_gateway.sdapi.infotext import read_infotext, request_fields
from imagemesh_gateway.sdapi.options import Options
from imagemesh_gateway.sdapi.pictures import bounded, filled, fitted, mask_of, picture_of, png_of
from imagemesh_gateway.sdapi.samplers import scheduler_name
from imagemesh_gateway.sdapi.units import control, units_of
from imagemesh_runtime.errors import InvalidArgument, NotFound
from imagemesh_runtime.limits import (
    MAX_GUIDANCE,
    MAX_HIRES_SCALE,
    MAX_IMAGES,
    MAX_MASK_BLUR,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    check_range,
)

Body = TypeVar("Body", bound=GenerationBody)

PREVIEW_EVERY: Final = 2
_MASK_BLUR: Final = 4
_UNITS: Final = "alwayson_scripts.ControlNet.args"
_MULTIPLE: Final = 8
_NO_UPSCALER: Final = frozenset({"", "none"})


@dataclass(frozen=True)
class Asked:
    """A request, and the settings in it that change nothing."""

    request: pb.GenerateRequest
    ignored: list[str]


async def from_text(body: Txt2ImgBody, mesh: Mesh, options: Options) -> Asked:
    """What ``txt2img`` asks for.

    Raises:
        InvalidArgument, NotFound: a value isn't allowed, or names what isn't there.
    """
    body = restored(body)
    asked = _common(body, options)
    if body.enable_hr:
        asked.request.hires.CopyFrom(_hires(body))
    await _add_controls(asked.request, body, mesh, None)
    return asked


async def from_image(body: Img2ImgBody, mesh: Mesh, options: Options) -> Asked:
    """What ``img2img`` asks for; errors as above."""
    body = restored(body)
    asked = _common(body, options)
    request = asked.request
    if len(body.init_images or ()) != 1:
        raise InvalidArgument("init_images", f"{len(body.init_images or ())} pictures", "one picture")
    request.strength = _in_range("denoising_strength", body.denoising_strength, 0.75, 0, 1)
    start = await asyncio.to_thread(_add_pictures, request, body)
    await _add_controls(request, body, mesh, start)
    return asked


def restored(body: Body) -> Body:
    """The body with what its ``infotext`` says where it says nothing itself."""
    if not body.infotext:
        return body
    told = request_fields(read_infotext(body.infotext))
    given = {name: getattr(body, name) for name in body.model_fields_set}
    fields = {name: value for name, value in told.items() if name in type(body).model_fields}
    try:
        return type(body).model_validate(fields | given)
    except ValidationError as error:
        raise InvalidArgument("infotext", body.infotext, "what a picture's parameters say") from error


def _common(body: GenerationBody, options: Options) -> Asked:
    _refuse_what_is_not_here(body)
    model, clip, ignored = options.overridden(body.override_settings or {})
    clip = int(_in_range("clip_skip", body.clip_skip, clip, 0, 12))
    count = (body.batch_size or 1) * (body.n_iter or 1)
    check_range("n_iter times batch_size", count, 1, MAX_IMAGES)
    request = pb.GenerateRequest(
        prompt=body.prompt or "",
        negative_prompt=body.negative_prompt or "",
        model=model,
        width=int(_in_range("width", body.width, 0, 0, MAX_SIDE)),
        height=int(_in_range("height", body.height, 0, 0, MAX_SIDE)),
        scheduler=scheduler_name(body.sampler_name or body.sampler_index, body.scheduler),
        num_images=count,
        clip_skip=max(clip - 1, 0),
        priority=priority_pb2.PRIORITY_INTERACTIVE,
        preview_every=PREVIEW_EVERY,
    )
    if body.steps is not None:
        request.steps = int(_in_range("steps", body.steps, 0, 1, MAX_STEPS))
    if body.cfg_scale is not None:
        request.guidance_scale = _in_range("cfg_scale", body.cfg_scale, 0, 0, MAX_GUIDANCE)
    if (seed := _in_range("seed", body.seed, -1, -1, MAX_SEED)) >= 0:
        request.seed = int(seed)
    request.variation_strength = _in_range("subseed_strength", body.subseed_strength, 0, 0, 1)
    if request.variation_strength and (seed := _in_range("subseed", body.subseed, -1, -1, MAX_SEED)) >= 0:
        request.variation_seed = int(seed)
    return Asked(request, ignored)


def _refuse_what_is_not_here(body: GenerationBody) -> None:
    if body.script_name:
        raise NotFound("script", body.script_name, ())
    if body.styles:
        raise NotFound("style", body.styles[0], ())
    for name in ("restore_faces", "tiling"):
        if getattr(body, name):
            raise InvalidArgument(name, True, "false: there is nothing here that does it")
    if body.refiner_checkpoint not in (None, "", "None"):
        raise InvalidArgument("refiner_checkpoint", body.refiner_checkpoint, "left out: there is no refiner")


def _in_range(field: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    check_range(field, value, low, high)
    return value


def _hires(body: Txt2ImgBody) -> pb.GenerateHires:
    _same_as_first("hr_prompt", body.hr_prompt, body.prompt)
    _same_as_first("hr_negative_prompt", body.hr_negative_prompt, body.negative_prompt)
    _same_as_first("hr_checkpoint_name", body.hr_checkpoint_name, "Use same checkpoint")
    upscaler = body.hr_upscaler or "Latent"
    told = pb.GenerateHires(
        upscaler="Lanczos" if upscaler.casefold() in _NO_UPSCALER else upscaler,
        strength=_in_range("denoising_strength", body.denoising_strength, 0.75, 0, 1),
        scheduler=scheduler_name(body.hr_sampler_name, body.hr_scheduler, "hr_scheduler"),
    )
    if steps := int(_in_range("hr_second_pass_steps", body.hr_second_pass_steps, 0, 0, MAX_STEPS)):
        told.steps = steps
    width = int(_in_range("hr_resize_x", body.hr_resize_x, 0, 0, MAX_SIDE))
    height = int(_in_range("hr_resize_y", body.hr_resize_y, 0, 0, MAX_SIDE))
    if not (width or height):
        told.scale = _in_range("hr_scale", body.hr_scale, 2.0, 1, MAX_HIRES_SCALE)
        return told
    if not (width and height):  # the other side follows
        if not (body.width and body.height):
            raise InvalidArgument("hr_resize_x", width, "given with hr_resize_y, or with width and height")
        ratio = body.width / body.height
        width, height = width or _near(height * ratio), height or _near(width / ratio)
    told.width, told.height = width, height
    return told


def _near(pixels: float) -> int:
    return max(round(pixels / _MULTIPLE), 1) * _MULTIPLE


def _same_as_first(field: str, value: str | None, first: str | None) -> None:
    if value and value != first:
        raise InvalidArgument(field, value, "left out: the second pass has what the first has")


def _add_pictures(request: pb.GenerateRequest, body: Img2ImgBody) -> bytes:
    """Fill in the picture and the mask; answers the picture as it comes, fitted."""
    assert body.init_images is not None
    mode = body.resize_mode or 0
    if mode and not (request.width and request.height):
        raise InvalidArgument("resize_mode", mode, "0 where width and height are left out")

    def fit(picture: Image.Image) -> Image.Image:
        return fitted(picture, request.width, request.height, mode) if mode else bounded(picture)

    picture = fit(picture_of(body.init_images[0], "init_images[0]"))
    start = png_of(picture)
    if body.mask:
        mask = fit(mask_of(body.mask, "mask"))
        _add_mask(request, body, mask)
        if not body.inpainting_fill:
            hole = mask.point(lambda value: 255 - value) if body.inpainting_mask_invert else mask
            picture = filled(picture, hole)
    request.image.CopyFrom(image_pb2.Image(encoded=png_of(picture)))
    return start


def _add_mask(request: pb.GenerateRequest, body: Img2ImgBody, mask: Image.Image) -> None:
    sides: list[Any] = [one for one in (body.mask_blur_x, body.mask_blur_y) if one is not None]
    blur = body.mask_blur if body.mask_blur is not None else max(sides, default=_MASK_BLUR)
    request.mask.CopyFrom(image_pb2.Image(encoded=png_of(mask)))
    request.mask_blur = int(_in_range("mask_blur", blur, 0, 0, MAX_MASK_BLUR))
    request.invert_mask = bool(body.inpainting_mask_invert)
    request.keep_unmasked = True
    if body.inpaint_full_res is not False:
        padding = _in_range("inpaint_full_res_padding", body.inpaint_full_res_padding, 0, 0, MAX_SIDE)
        request.mask_padding = int(padding)


async def _add_controls(request: pb.GenerateRequest, body: GenerationBody, mesh: Mesh, start: bytes | None) -> None:
    units = units_of(body.alwayson_scripts)
    infos = await mesh.preprocessors.infos() if units else []
    request.controls.extend(control(unit, f"{_UNITS}[{i}]", start, infos) for i, unit in enumerate(units))
