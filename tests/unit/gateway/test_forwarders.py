"""Calls that the gateway hands on to a service: what it adds, and whom it refuses, without a service behind it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from imagemesh.v1 import gateway_service_pb2, model_loading_service_pb2, preprocess_service_pb2, search_service_pb2
from imagemesh_gateway.access.caller import ANYBODY, Caller, set_current_caller
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.loading import LoadingForwarder
from imagemesh_gateway.preprocess import Preprocessors
from imagemesh_gateway.search import SearchForwarder
from imagemesh_runtime.errors import MeshError, PermissionDenied, Unavailable
from imagemesh_runtime.metrics import Metrics
from tests.support.keys import new_key


class Vit:
    """Replicas that remember what they are asked, and a catalogue that may be broken."""

    def __init__(self, answers: Any = (), error: MeshError | None = None) -> None:
        self.requests: list[Any] = []
        self.error = error
        self.channel = _Channel()
        self._answers = answers
        self.mesh: Any = SimpleNamespace(vit=self, catalogue=self)

    async def unary(self, method: Any, request: Any) -> Any:
        self.requests.append(request)
        return search_service_pb2.IndexImagesResponse()

    async def everywhere(self, method: Any, request: Any) -> Any:
        self.requests.append(request)
        return self._answers

    async def find(self, replicas: Any, name: str) -> Any:
        return SimpleNamespace(name="emoji-vit")

    async def fetch(self, replicas: Any) -> None:
        if self.error is not None:
            raise self.error


class _Channel:
    """Of which stubs can be made."""

    def __getattr__(self, kind: str) -> Any:
        return lambda path, **_: path


@pytest.fixture
def picky() -> Iterator[None]:
    """The caller's key is for few models."""
    set_current_caller(Caller(new_key(models=("emoji-*",))[0]))
    yield
    set_current_caller(ANYBODY)


@pytest.mark.usefixtures("picky")
async def test_a_new_index_takes_the_gateways_default_model_whatever_the_caller_calls_its() -> None:
    vit = Vit()
    search = SearchForwarder(vit.mesh, Metrics("gateway"))
    await search.IndexImages(search_service_pb2.IndexImagesRequest(index="i", default_model="secret"), None)
    await search.IndexImages(
        search_service_pb2.IndexImagesRequest(index="i", model="emoji-x", default_model="secret"), None
    )
    assert [(one.model, one.default_model) for one in vit.requests] == [("", "emoji-vit"), ("emoji-x", "")]


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize("kind", ["Load", "Unload"])
async def test_a_model_that_the_key_is_not_for_is_neither_loaded_nor_unloaded(kind: str) -> None:
    vit = Vit()
    request = getattr(model_loading_service_pb2, f"{kind}ModelRequest")(name="secret")
    with pytest.raises(PermissionDenied, match="is not for model 'secret'"):
        await getattr(LoadingForwarder(vit.mesh), f"{kind}Model")(request, None)
    assert vit.requests == []


@pytest.mark.parametrize("kind", ["Load", "Unload"])
async def test_what_any_replica_did_is_told_also_where_the_catalogue_is_silent_then(kind: str) -> None:
    message = getattr(model_loading_service_pb2, f"{kind}ModelResponse")
    vit = Vit([message(changed=False), message(changed=True)], Unavailable("vit", "is absent"))
    request = getattr(model_loading_service_pb2, f"{kind}ModelRequest")(name="v")
    answer = await getattr(LoadingForwarder(vit.mesh), f"{kind}Model")(request, None)
    assert answer.changed


class ControlNet:
    """Replicas, and the only one of them, with one preprocessor, which remember what they are asked."""

    def __init__(self, *models: str) -> None:
        self.channel = _Channel()
        self.requests: list[Any] = []
        self._infos = [preprocess_service_pb2.PreprocessorInfo(name="depth", needs_model=True, models=models)]

    async def unary(self, method: Any, request: Any, hop: Any = None, **_: Any) -> Any:
        self.requests.append(request)
        return preprocess_service_pb2.PreprocessResponse()

    async def survey(self, question: Any) -> list[Any]:
        return [preprocess_service_pb2.ListPreprocessorsResponse(preprocessors=self._infos)]


def preprocessors(service: Any) -> Preprocessors:
    return Preprocessors(GatewayConfig(), service)


@pytest.mark.usefixtures("picky")
async def test_a_preprocessors_model_is_the_first_that_the_key_is_for() -> None:
    service = ControlNet("a-depth", "emoji-depth", "emoji-more")
    served = preprocessors(service)
    await served.run(preprocess_service_pb2.PreprocessRequest(preprocessor="depth"))
    assert [one.model for one in service.requests] == ["emoji-depth"]
    wanted = await served.wanted(gateway_service_pb2.GenerateControl(preprocessor="depth"), "controls[0]")
    assert wanted is not None
    assert wanted.model == "emoji-depth"
    assert [list(info.models) for info in await served.infos()] == [["emoji-depth", "emoji-more"]]


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize(
    ("models", "asked", "told"),
    [
        (("a-depth", "emoji-depth"), "a-depth", "is not for model 'a-depth'"),
        (("a-depth",), "", "is for no model of preprocessor depth"),
    ],
)
async def test_a_preprocessors_model_of_others_is_refused(models: tuple[str, ...], asked: str, told: str) -> None:
    service = ControlNet(*models)
    with pytest.raises(PermissionDenied, match=told):
        await preprocessors(service).run(preprocess_service_pb2.PreprocessRequest(preprocessor="depth", model=asked))
    assert service.requests == []
