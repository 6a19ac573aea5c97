"""What OpenAI's image calls send: JSON to make pictures, a form to change one."""

import asyncio
import io
import re
from typing import Annotated, Any, Final, Literal

from PIL import Image, ImageOps
from pydantic import BeforeValidator, Field
from starlette.datastructures import FormData, UploadFile

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, job_service_pb2, priority_pb2
from imagemesh_gateway.http_body import ALLOWED, Seed, Steps, Strength, Strict, Text
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.images import decode_file
from imagemesh_runtime.limits import MAX_GUIDANCE, MAX_IMAGES

# OpenAI's links to pictures live for an hour, and so do ours.
KEPT_SECONDS: Final = 3600.0
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
OPENAI_ALLOWED: Final = {
    "prompt": ALLOWED["prompt"],
    "model": ALLOWED["model"],
    "n": f"1 to {MAX_IMAGES}",
    "size": "auto, or WIDTHxHEIGHT in pixels",
    "response_format": "url, b64_json",
    "output_format": "png, jpeg, webp",
    "output_compression": "0 to 100",
    "background": "auto, opaque",
    "stream": "false",
    "quality": "a string",
    "style": "a string",
    "moderation": "a string",
    "input_fidelity": "a string",
    "user": "a string",
    "safety_identifier": "a string",
    "negative_prompt": ALLOWED["negative_prompt"],
    "seed": ALLOWED["seed"],
    "steps": ALLOWED["steps"],
    "guidance": ALLOWED["guidance"],
    "scheduler": ALLOWED["scheduler"],
    "strength": ALLOWED["strength"],
}


def _no(value: object) -> object:
    return False if value in (False, "false", None) else value


class OpenAIBody(Strict):
    """The fields of both calls, and of ours those that have no like there."""

    prompt: Text
    model: Text | None = None
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: Text | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    background: Literal["auto", "opaque"] | None = None
    stream: Annotated[Literal[False] | None, BeforeValidator(_no)] = None
    # These change nothing.
    quality: Text | None = None
    style: Text | None = None
    moderation: Text | None = None
    input_fidelity: Text | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    # What follows is ours.
    negative_prompt: Text = ""
    seed: Seed | None = None
    steps: Steps | None = None
    guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    scheduler: Text = ""
    strength: Strength | None = None

    def to_create(self, image: bytes | None = None, mask: bytes | None = None) -> job_service_pb2.CreateJobRequest:
        """The same as a job; ``mask`` is bright where to redraw.

        Raises:
            InvalidArgument: the size is none, or goes with no other value.
        """
        if self.response_format == "url" and self.output_format in ("jpeg", "webp"):
            raise InvalidArgument("output_format", self.output_format, "png where response_format is url")
        width, height = self._size()
        generate = pb.GenerateRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            model=self.model or "",
            width=width,
            height=height,
            steps=self.steps,
            guidance_scale=self.guidance,
            scheduler=self.scheduler,
            seed=self.seed,
            num_images=self.n,
            strength=self.strength,
            image=None if image is None else image_pb2.Image(encoded=image),
            mask=None if mask is None else image_pb2.Image(encoded=mask),
            keep_unmasked=mask is not None,
            priority=priority_pb2.PRIORITY_INTERACTIVE,
        )
        return job_service_pb2.CreateJobRequest(generate=generate, retention_seconds=KEPT_SECONDS)

    def _size(self) -> tuple[int, int]:
        if self.size in (None, "auto"):
            return 0, 0
        match = _SIZE.fullmatch(self.size or "")
        if match is None or not (int(match[1]) and int(match[2])):
            raise InvalidArgument("size", self.size, OPENAI_ALLOWED["size"])
        return int(match[1]), int(match[2])


async def read_form(form: FormData) -> tuple[dict[str, Any], bytes, bytes | None]:
    """The plain fields of an edit, its picture, and its mask as ours are: bright where to redraw.

    Raises:
        InvalidArgument: a picture is missing, is none, or is one too many.
    """
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        key = name.removesuffix("[]")
        if key in files:
            raise InvalidArgument(key, "several", "one picture")
        if isinstance(value, UploadFile):
            files[key] = await value.read()
        else:
            fields[key] = value
    for name in {"image", "mask"} & set(fields):
        raise InvalidArgument(name, fields[name], "a file")
    for name in set(files) - {"image", "mask"}:
        raise InvalidArgument(name[:80], "a file", "left out (files are image, mask)")
    if "image" not in files:
        raise InvalidArgument("image", None, "a PNG, JPEG or WebP file")
    return fields, files["image"], await asyncio.to_thread(_mask, files["image"], files.get("mask"))


def _mask(image: bytes, mask: bytes | None) -> bytes | None:
    """White where the mask, or else the picture itself, is transparent; None: nothing tells what to keep."""
    name, file = ("image", image) if mask is None else ("mask", mask)
    decode_file(file, name)  # within all bounds
    with Image.open(io.BytesIO(file)) as picture:
        if not picture.has_transparency_data:
            if mask is not None:
                raise InvalidArgument("mask", f"a picture of mode {picture.mode}", "transparent where to redraw")
            return None
        alpha = ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")  # turned as the picture is
    out = io.BytesIO()
    alpha.point(lambda value: 255 if value < 128 else 0).save(out, format="PNG")
    return out.getvalue()
