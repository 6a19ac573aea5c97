"""The ControlNet extension's own routes."""

import asyncio
from typing import Any, Final

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import Field

from imagemesh.v1 import image_pb2
from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh_gateway.http_body import Strict, Text
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.sdapi.pictures import file_of, in_base64, png_of
from imagemesh_gateway.sdapi.units import thresholds
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import MAX_CONTROLS, MAX_IMAGES
from imagemesh_runtime.preprocessing import find_preprocessor
from imagemesh_runtime.tensors import Array, from_proto

# Of the extension whose form this is; clients ask for it to learn which fields they may send.
_VERSION: Final = 2


class DetectBody(Strict):
    """Pictures to preprocess."""

    controlnet_module: Text = "none"
    controlnet_input_images: list[Text] = Field(default_factory=list, max_length=MAX_IMAGES)
    controlnet_processor_res: int = 512
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1
    controlnet_masks: list[Text] = Field(default_factory=list, max_length=MAX_IMAGES)
    low_vram: bool = False


def add_controlnet(router: APIRouter, mesh: Mesh) -> None:
    """All of them."""

    @router.get("/controlnet/version")
    async def version() -> Response:
        """Tell the version of the form."""
        return JSONResponse({"version": _VERSION})

    @router.get("/controlnet/settings")
    async def settings() -> Response:
        """Tell how many units a request may have."""
        return JSONResponse({"control_net_unit_count": MAX_CONTROLS})

    @router.get("/controlnet/model_list")
    async def models() -> Response:
        """List the ControlNets."""
        return JSONResponse({"model_list": sorted(await mesh.catalogue.fetch(mesh.controlnet))})

    @router.get("/controlnet/module_list")
    async def modules() -> Response:
        """List the preprocessors."""
        infos = await mesh.preprocessors.infos()
        details = {info.name: {"model_free": not info.needs_model, "sliders": _sliders(info)} for info in infos}
        return JSONResponse({"module_list": ["none", *details], "module_detail": details})

    @router.get("/controlnet/control_types")
    async def types() -> Response:
        """Tell the one group that all of them are in."""
        names = ["none", *(info.name for info in await mesh.preprocessors.infos())]
        models = ["None", *sorted(await mesh.catalogue.fetch(mesh.controlnet))]
        told = {"module_list": names, "model_list": models, "default_option": "none", "default_model": "None"}
        return JSONResponse({"control_types": {"All": told}})

    @router.post("/controlnet/detect")
    async def detect(body: DetectBody) -> Response:
        """Preprocess pictures."""
        told = {"images": await _detected(mesh, body), "info": "Success"}
        return await asyncio.to_thread(JSONResponse, told)


def _sliders(info: pb.PreprocessorInfo) -> list[dict[str, Any]]:
    numbers = [one for one in info.parameters if one.HasField("minimum") and one.HasField("maximum")]
    return [
        {"name": one.name, "value": float(one.default_value), "min": one.minimum, "max": one.maximum, "step": 1}
        for one in numbers
    ]


async def _detected(mesh: Mesh, body: DetectBody) -> list[str]:
    if not body.controlnet_input_images:
        raise InvalidArgument("controlnet_input_images", "none", f"1 to {MAX_IMAGES} pictures in base64")
    info = find_preprocessor(await mesh.preprocessors.infos(), body.controlnet_module)
    given = thresholds(info, body.controlnet_threshold_a, body.controlnet_threshold_b, "controlnet_")
    images = []
    for i, text in enumerate(body.controlnet_input_images):
        request = pb.PreprocessRequest(
            preprocessor=info.name,
            parameters=given,
            resolution=max(min(body.controlnet_processor_res, 2**31), 0),
            image=image_pb2.Image(encoded=file_of(text, f"controlnet_input_images[{i}]")),
        )
        answer = await mesh.preprocessors.run(request)
        pixels = from_proto(answer.image, "image", dtypes=["uint8"], shape=(None, None, 3))
        images.append(await asyncio.to_thread(_encoded, pixels))
    return images


def _encoded(pixels: Array) -> str:
    return in_base64(png_of(Image.fromarray(pixels)))
