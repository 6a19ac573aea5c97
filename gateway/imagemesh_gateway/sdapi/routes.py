"""All routes of that API."""

import asyncio

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse

from imagemesh_gateway.http_shapes import shaped
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.sdapi.bodies import IMG2IMG_ALLOWED, TXT2IMG_ALLOWED, Img2ImgBody, Txt2ImgBody
from imagemesh_gateway.sdapi.controlnet import add_controlnet
from imagemesh_gateway.sdapi.errors import sdapi_error
from imagemesh_gateway.sdapi.extras import EXTRAS_ALLOWED, add_extras
from imagemesh_gateway.sdapi.lists import add_lists
from imagemesh_gateway.sdapi.options import Options
from imagemesh_gateway.sdapi.translate import from_image, from_text
from imagemesh_gateway.sdapi.work import Work


def add_sdapi(app: FastAPI, mesh: Mesh, jobs: Jobs) -> None:
    """Everything below ``/sdapi/v1`` and ``/controlnet``."""
    options, work = Options(mesh), Work(jobs)
    text = APIRouter(route_class=shaped(sdapi_error, TXT2IMG_ALLOWED))
    image = APIRouter(route_class=shaped(sdapi_error, IMG2IMG_ALLOWED))
    others = APIRouter(route_class=shaped(sdapi_error, EXTRAS_ALLOWED))

    @text.post("/sdapi/v1/txt2img")
    async def txt2img(body: Txt2ImgBody) -> Response:
        """Make pictures from a prompt."""
        told = await work.generate(await from_text(body, mesh, options), body)
        return await asyncio.to_thread(JSONResponse, told)

    @image.post("/sdapi/v1/img2img")
    async def img2img(body: Img2ImgBody) -> Response:
        """Make pictures from a picture."""
        told = await work.generate(await from_image(body, mesh, options), body)
        return await asyncio.to_thread(JSONResponse, told)

    _add_control(others, work)
    add_lists(others, mesh, options)
    add_extras(others, mesh)
    add_controlnet(others, mesh)
    for router in (text, image, others):
        app.include_router(router)


def _add_control(router: APIRouter, work: Work) -> None:
    @router.get("/sdapi/v1/progress")
    async def progress(skip_current_image: bool = False) -> Response:
        """Tell how the oldest generation of these clients stands."""
        return JSONResponse(await work.progress(not skip_current_image))

    async def interrupt() -> Response:
        """End what runs; those who wait for it get what there is: nothing."""
        await work.interrupt()
        return JSONResponse({})

    for name in ("interrupt", "skip"):
        router.add_api_route(f"/sdapi/v1/{name}", interrupt, methods=["POST"], name=name)
