"""Pictures made larger, read, and named: ``extra-*``, ``png-info``, ``interrogate``."""

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import Field

from imagemesh.v1 import image_pb2, vit_service_pb2
from imagemesh_gateway.http_body import Strict, Text
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.modes import PICTURE_UPSCALERS
from imagemesh_gateway.sdapi.infotext import read_infotext
from imagemesh_gateway.sdapi.pictures import file_of, fitted, in_base64, picture_of, png_of
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from imagemesh_runtime.images import FORMATS, decode_file
from imagemesh_runtime.limits import MAX_IMAGES, MAX_REQUEST_PIXELS, MAX_SIDE, check_range

UPSCALERS: Final = ("None", *PICTURE_UPSCALERS)
_MAX_FACTOR: Final = 8.0
# Of its own, since what runs in a thread can't be ended: the gateway's other work doesn't wait behind it.
_POOL: Final = ThreadPoolExecutor(2, "extras")
_METADATA: Final = ("parameters", "prompt", "comment", "Software", "Title", "Description", "postprocessing", "extras")
EXTRAS_ALLOWED: Final = {"upscaler_1": ", ".join(UPSCALERS), "upscaler_2": ", ".join(UPSCALERS)}


class ExtrasBody(Strict):
    """How pictures are to be resized."""

    resize_mode: int = Field(0, ge=0, le=1)
    show_extras_results: bool = True
    gfpgan_visibility: float = 0
    codeformer_visibility: float = 0
    codeformer_weight: float = 0
    upscaling_resize: float = 2
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaling_crop: bool = True
    upscaler_1: Text = "None"
    upscaler_2: Text = "None"
    extras_upscaler_2_visibility: float = 0
    upscale_first: bool = False

    def check(self, pictures: Sequence[tuple[int, int]]) -> None:
        """Bounds on all pictures of the request together, by their sizes, before and after.

        Raises:
            InvalidArgument: they are more.
        """
        for field, sizes in (("image", pictures), ("upscaling_resize", [self._size(one) for one in pictures])):
            pixels = sum(width * height for width, height in sizes)
            if pixels > MAX_REQUEST_PIXELS:
                raise InvalidArgument(field, f"{pixels} pixels", f"at most {MAX_REQUEST_PIXELS} pixels in all")

    def run(self, picture: Image.Image) -> Image.Image:
        """The picture, resized.

        Raises:
            InvalidArgument: a value isn't allowed, or nothing here does it.
            NotFound: there is no such upscaler.
        """
        for name in ("gfpgan_visibility", "codeformer_visibility"):
            if getattr(self, name):
                raise InvalidArgument(name, getattr(self, name), "0: there is nothing here that restores faces")
        check_range("extras_upscaler_2_visibility", self.extras_upscaler_2_visibility, 0, 1)
        first = self._by(self.upscaler_1, picture)
        if self.upscaler_2 == "None" or not self.extras_upscaler_2_visibility:
            return first
        second = self._by(self.upscaler_2, picture).resize(first.size)
        return Image.blend(first, second, self.extras_upscaler_2_visibility)

    def _by(self, upscaler: str, picture: Image.Image) -> Image.Image:
        if upscaler not in UPSCALERS:
            raise NotFound("upscaler", upscaler, UPSCALERS)
        size = self._size(picture.size)
        if upscaler == "None":
            return picture
        if self.resize_mode == 1 and self.upscaling_crop:
            return fitted(picture, *size, mode=1)
        return picture.resize(size, PICTURE_UPSCALERS[upscaler])

    def _size(self, picture: tuple[int, int]) -> tuple[int, int]:
        if self.resize_mode == 1:
            check_range("upscaling_resize_w", self.upscaling_resize_w, 1, MAX_SIDE)
            check_range("upscaling_resize_h", self.upscaling_resize_h, 1, MAX_SIDE)
            return self.upscaling_resize_w, self.upscaling_resize_h
        check_range("upscaling_resize", self.upscaling_resize, 0.1, _MAX_FACTOR)
        width, height = (max(round(side * self.upscaling_resize), 1) for side in picture)
        return width, height


class SingleBody(ExtrasBody):
    """One picture."""

    image: Text = ""


class FileBody(Strict):
    """A picture with a name."""

    data: Text
    name: Text = ""


class BatchBody(ExtrasBody):
    """Several."""

    imageList: list[FileBody] = Field(max_length=MAX_IMAGES)  # noqa: N815


class PngInfoBody(Strict):
    """A picture to read."""

    image: Text = ""


class InterrogateBody(Strict):
    """A picture to name, and by what; the names that such clients send mean the mesh's own."""

    image: Text = ""
    model: Text = "clip"


def add_extras(router: APIRouter, mesh: Mesh) -> None:
    """All four routes."""

    @router.post("/sdapi/v1/extra-single-image")
    async def extra_single_image(body: SingleBody) -> Response:
        """Resize a picture."""
        (made,) = await resized(body, [(body.image, "image")])
        return JSONResponse({"html_info": f"{body.upscaler_1}", "image": made})

    @router.post("/sdapi/v1/extra-batch-images")
    async def extra_batch_images(body: BatchBody) -> Response:
        """Resize several."""
        named = [(one.data, f"imageList[{i}].data") for i, one in enumerate(body.imageList)]
        told = {"html_info": f"{body.upscaler_1}", "images": await resized(body, named)}
        return await asyncio.to_thread(JSONResponse, told)

    @router.post("/sdapi/v1/png-info")
    async def png_info(body: PngInfoBody) -> Response:
        """Read how a picture was made."""
        items = await asyncio.to_thread(_metadata, file_of(body.image, "image"))
        text = items.get("parameters", "")
        return JSONResponse({"info": text, "items": items, "parameters": read_infotext(text) if text else {}})

    @router.post("/sdapi/v1/interrogate")
    async def interrogate(body: InterrogateBody) -> Response:
        """Name what is in a picture, by the ViT's label, and say so."""
        return JSONResponse(await _named(mesh, body))


async def resized(body: ExtrasBody, pictures: list[tuple[str, str]]) -> list[str]:
    """The pictures, each with its field, resized and in base64: one after the other, as long as someone waits.

    Raises:
        InvalidArgument: one is none, or all of them together are too large.
    """
    loop, sizes = asyncio.get_running_loop(), list[tuple[int, int]]()

    def run(text: str, field: str) -> str:
        picture = picture_of(text, field)
        sizes.append(picture.size)
        body.check(sizes)
        return in_base64(png_of(body.run(picture)))

    return [await loop.run_in_executor(_POOL, run, text, field) for text, field in pictures]


def _metadata(file: bytes) -> dict[str, str]:
    decode_file(file, "image")  # within all bounds
    with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
        found = {name: picture.info[name] for name in _METADATA if name in picture.info}
    return {name: text for name, text in found.items() if isinstance(text, str)}


async def _named(mesh: Mesh, body: InterrogateBody) -> dict[str, Any]:
    names = {"", "clip", "deepdanbooru", "deepbooru"}
    model = await mesh.catalogue.find(mesh.vit, "" if body.model.casefold() in names else body.model)
    asked = vit_service_pb2.ClassifyImagesRequest(
        model=model.name, images=[image_pb2.Image(encoded=file_of(body.image, "image"))], top_k=1
    )
    answer = await mesh.vit.unary(mesh.see.ClassifyImages, asked)
    labels = answer.classifications[0].predictions if answer.classifications else ()
    if not labels:
        raise FailedPrecondition(f"model {model.name} finds nothing in the picture")
    told = {"model": answer.model, "kind": "label", "probability": labels[0].probability}
    return {"caption": labels[0].label, **told}
