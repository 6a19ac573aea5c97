"""The models over HTTP, in the form of OpenAI's list with what else is known of them."""

from typing import Any

from google.protobuf.json_format import MessageToDict

from imagemesh_gateway.mesh import Mesh, ModelInfo
from imagemesh_runtime.errors import NotFound


async def models_json(mesh: Mesh) -> dict[str, Any]:
    """All models, each once with all its parts."""
    infos, unreachable = await mesh.models()
    parts: dict[str, list[ModelInfo]] = {}
    for info in infos:
        parts.setdefault(info.name, []).append(info)
    data = [_model(name, parts[name]) for name in sorted(parts)]
    return {"object": "list", "data": data, "unreachable": unreachable}


async def model_json(mesh: Mesh, name: str) -> dict[str, Any]:
    """One of them.

    Raises:
        NotFound: there is no such model.
    """
    known: dict[str, dict[str, Any]] = {one["id"]: one for one in (await models_json(mesh))["data"]}
    if name not in known:
        raise NotFound("model", name, known)
    return known[name]


def _model(name: str, infos: list[ModelInfo]) -> dict[str, Any]:
    parts = [MessageToDict(info, preserving_proto_field_name=True) for info in infos]
    for part in parts:
        del part["name"]
    # Nobody knows when it was made, and OpenAI's clients want a number.
    return {"id": name, "object": "model", "created": 0, "owned_by": "imagemesh", "parts": parts}
