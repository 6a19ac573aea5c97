"""What there is, as that API lists it; what there is nothing of is an empty list."""

import os
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.modes import LATENT_UPSCALERS
from imagemesh_gateway.sdapi.extras import UPSCALERS
from imagemesh_gateway.sdapi.options import Options
from imagemesh_gateway.sdapi.samplers import samplers_json, schedules_json

_EMPTY = ("sd-vae", "loras", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "script-info")
# Clients look for the last one to learn whether there are ControlNets.
_SCRIPTS = ["controlnet", "controlnet m2m"]


def add_lists(router: APIRouter, mesh: Mesh, options: Options) -> None:
    """All routes that list, and the options."""
    _add_models(router, mesh)
    _add_constants(router)

    @router.get("/sdapi/v1/options")
    async def get_options() -> Response:
        """Tell the options."""
        return JSONResponse(await options.told())

    @router.post("/sdapi/v1/options")
    async def set_options(body: dict[str, Any]) -> Response:
        """Set options for requests that name nothing else."""
        await options.set(body)
        return JSONResponse(None)

    @router.get("/sdapi/v1/samplers")
    async def samplers() -> Response:
        """List the samplers."""
        return JSONResponse(samplers_json(list(await mesh.schedulers())))


def _add_models(router: APIRouter, mesh: Mesh) -> None:
    @router.get("/sdapi/v1/sd-models")
    async def models() -> Response:
        """List the models that make pictures."""
        named = {"hash": None, "sha256": None, "config": None}
        found = await mesh.catalogue.fetch(mesh.diffusion)
        return JSONResponse([{"title": name, "model_name": name, "filename": name, **named} for name in sorted(found)])

    @router.post("/sdapi/v1/refresh-checkpoints")
    async def refresh() -> Response:
        """Ask the services anew which models they have."""
        await mesh.models()
        return JSONResponse(None)

    @router.get("/sdapi/v1/embeddings")
    async def embeddings() -> Response:
        """List the words that textual inversions give meaning to."""
        models = await mesh.catalogue.fetch(mesh.text_encoder)
        words = {word for info in models.values() for word in info.properties.get("embeddings", "").split(", ") if word}
        told = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
        return JSONResponse({"loaded": dict.fromkeys(sorted(words), told), "skipped": {}})


def _add_constants(router: APIRouter) -> None:
    def add(name: str, told: Any) -> None:
        async def tell() -> Response:
            return JSONResponse(told)

        router.add_api_route(f"/sdapi/v1/{name}", tell, name=name, summary=f"List {name}.")

    for name in _EMPTY:
        add(name, [])
    add("schedulers", schedules_json())
    told = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    add("upscalers", [{"name": name, **told} for name in UPSCALERS])
    add("latent-upscale-modes", [{"name": name} for name in LATENT_UPSCALERS])
    add("scripts", {"txt2img": _SCRIPTS, "img2img": _SCRIPTS})
    add("cmd-flags", {})

    @router.get("/sdapi/v1/memory")
    async def memory() -> Response:
        """Tell the memory of the gateway's machine; the services may be on others."""
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        ram = {"free": free, "used": total - free, "total": total}
        return JSONResponse({"ram": ram, "cuda": {"error": "the gateway has no device; the services have metrics"}})
