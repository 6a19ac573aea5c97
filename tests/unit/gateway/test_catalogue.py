"""What the gateway takes the models of a service to be whose replicas have different ones: nobody is called."""

from typing import Any

import pytest

from imagemesh.v1 import model_service_pb2, preprocess_service_pb2
from imagemesh.v1.gateway_service_pb2 import GenerateControl
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.mesh import Catalogue
from imagemesh_gateway.preprocess import Preprocessors
from imagemesh_runtime.errors import NotFound, Unavailable
from imagemesh_runtime.replicas import Replicas


class Named:
    """As much of a peer as choosing one takes."""

    def __init__(self, name: str) -> None:
        self.name = name


def controlnets(*names: str) -> Replicas:
    peers: Any = [Named(name) for name in names]
    return Replicas(peers, 60.0, name="controlnet")


async def listed(peer: Any) -> model_service_pb2.ListServedModelsResponse:
    if peer.name == "away":
        raise Unavailable("controlnet", "cannot be reached")
    models = [model_service_pb2.ModelInfo(name=peer.name), model_service_pb2.ModelInfo(name="both")]
    return model_service_pb2.ListServedModelsResponse(models=models, roots=["/models", f"/{peer.name}"])


async def test_controlnets_of_all_replicas_that_answer_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue, replicas = Catalogue(GatewayConfig()), controlnets("a", "away", "b")
    monkeypatch.setattr(catalogue, "_ask", listed)
    assert [(await catalogue.find(replicas, name)).name for name in ("a", "b", "both", "")] == ["a", "b", "both", "a"]
    assert catalogue.roots() == ["/models", "/a", "/b"]
    assert [replicas.rests(peer) for peer in replicas.peers] == [False, True, False]
    with pytest.raises(NotFound, match="a, b, both"):
        await catalogue.find(replicas, "c")


async def test_where_none_answers_the_service_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(GatewayConfig())
    monkeypatch.setattr(catalogue, "_ask", listed)
    with pytest.raises(Unavailable, match="controlnet: cannot be reached"):
        await catalogue.fetch(controlnets("away", "away"))
    with pytest.raises(Unavailable, match="no replica of it is known"):
        await catalogue.fetch(controlnets())


async def test_preprocessors_have_the_models_of_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    async def told(peer: Any) -> preprocess_service_pb2.ListPreprocessorsResponse:
        models = {"a": ["x", "both"], "b": ["both", "y"]}[peer.name]
        depth = preprocess_service_pb2.PreprocessorInfo(name="depth", needs_model=True, models=models)
        canny = preprocess_service_pb2.PreprocessorInfo(name="canny")
        return preprocess_service_pb2.ListPreprocessorsResponse(preprocessors=[depth, canny])

    preprocessors = Preprocessors(GatewayConfig(), controlnets("a", "b"))
    monkeypatch.setattr(preprocessors, "_ask", told)
    assert {one.name: list(one.models) for one in await preprocessors.infos()} == {
        "depth": ["x", "both", "y"], "canny": [],
    }  # fmt: skip
    wanted = await preprocessors.wanted(GenerateControl(preprocessor="depth", preprocessor_model="y"), "controls[0]")
    assert wanted is not None
    assert wanted.model == "y"
