"""The client, for callers with an event loop of their own."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, Unpack

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import gateway_service_pb2_grpc as rpc
from imagemesh.v1 import (
    model_loading_service_pb2,
    model_loading_service_pb2_grpc,
    preprocess_service_pb2,
    preprocess_service_pb2_grpc,
)
from imagemesh_client import answers
from imagemesh_client.aio_jobs import AsyncJobs
from imagemesh_client.fields import text
from imagemesh_client.images import ImageInput
from imagemesh_client.outgoing import Outgoing
from imagemesh_client.preprocessing import Preprocessed, Preprocessor, preprocess_request, preprocessed, preprocessors
from imagemesh_client.requests import GenerateOptions, generate_request
from imagemesh_client.search import AsyncIndexes
from imagemesh_client.types import (
    Classification,
    Embeddings,
    Event,
    Generation,
    Model,
    Models,
    PoolingName,
    Progress,
    Sampling,
)
from imagemesh_client.vision import EmbedOptions, classify_request, embed_request
from imagemesh_runtime.client import Peer, tls_files
from imagemesh_runtime.errors import InvalidArgument, MeshError

DEFAULT_ADDRESS = "127.0.0.1:50050"
MAX_MESSAGE_BYTES = 256 << 20


def _setting(given: str | Path | None, variable: str) -> str:
    return os.environ.get(variable, "") if given is None else str(given)


class AsyncClient:
    """A gateway at ``host:port`` or ``unix:/path``. It connects with the first call.

    Every method raises ``MeshError``, whose ``code`` tells the kind: INVALID_ARGUMENT before the call if a value can't
    be sent, UNAVAILABLE if the gateway isn't there, DEADLINE_EXCEEDED after ``timeout`` seconds; what the gateway
    itself answers is a ``RemoteError`` with its code, text and details. A cancelled call is cancelled in the mesh.

    Args:
        key: an API key, where the gateway wants one; None: what the variable IMAGEMESH_API_KEY holds, if anything.
        tls_authority: a PEM file of the authorities whose certificates the gateway may show, or "system"; then it is
            called by TLS. None: what IMAGEMESH_TLS_AUTHORITY holds.
        tls_certificate: a PEM file of a certificate to show; None: what IMAGEMESH_TLS_CERTIFICATE holds.
        tls_key: its private key; None: what IMAGEMESH_TLS_KEY holds.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float = 600.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        key: str | None = None,
        tls_authority: str | Path | None = None,
        tls_certificate: str | Path | None = None,
        tls_key: str | Path | None = None,
    ) -> None:
        if not timeout > 0:
            raise InvalidArgument("timeout", timeout, "a number of seconds above 0")
        self.address = address
        self._timeout = timeout
        self._max_message_bytes = max_message_bytes
        self._key = _setting(key, "IMAGEMESH_API_KEY")
        self._tls = tls_files(
            _setting(tls_authority, "IMAGEMESH_TLS_AUTHORITY"),
            _setting(tls_certificate, "IMAGEMESH_TLS_CERTIFICATE"),
            _setting(tls_key, "IMAGEMESH_TLS_KEY"),
        )
        self._connection: tuple[Peer, rpc.GatewayServiceStub] | None = None
        self._closed = False
        # Generations that the gateway keeps.
        self.jobs = AsyncJobs(lambda: self._connect()[0], timeout)
        # Pictures by their likeness.
        self.indexes = AsyncIndexes(lambda: self._connect()[0])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls under way and the connection."""
        self._closed = True
        if self._connection is not None:
            await self._connection[0].close()

    async def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Event, None]:
        """Generate, and tell how it goes: ``Queued``, ``Progress`` at each step, ``Result``.

        Leaving the iterator cancels the generation; the call begins when the first event is asked for.
        """
        request = await asyncio.to_thread(generate_request, prompt, **options)
        peer, stub = self._connect()
        async with aclosing(peer.stream(stub.Generate, request)) as responses:
            async for response in responses:
                event = answers.event(response)
                if event is not None:
                    yield event

    async def generate(
        self,
        prompt: str,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Make pictures of a prompt; ``on_progress`` is called after each step."""
        outcome = answers.Outcome(on_progress)
        async with aclosing(self.stream(prompt, **options)) as events:
            async for event in events:
                outcome.note(event)
        return outcome.generation()

    async def classify(
        self,
        images: ImageInput | Iterable[ImageInput],
        top_k: int = 5,
        *,
        threshold: float = 0.0,
        size: int | None = None,
        model: str = "",
    ) -> list[Classification]:
        """Name what is in each picture with its ``top_k`` likeliest labels of at least ``threshold`` probability."""
        request = await asyncio.to_thread(classify_request, images, top_k, threshold, size, model)
        peer, stub = self._connect()
        return answers.classifications(await peer.unary(stub.Classify, request))

    async def classify_stream(
        self,
        images: Iterable[ImageInput],
        top_k: int = 5,
        *,
        threshold: float = 0.0,
        size: int | None = None,
        model: str = "",
    ) -> AsyncGenerator[Classification | MeshError, None]:
        """Classify a list of any length, in its order; what is wrong with a picture comes in its place.

        Pictures are read and sent as the mesh gets through them, so that ``images`` may be a generator. One that can't
        be read ends the list with its error, after the answers for those before it.
        """

        def request(image: ImageInput) -> pb.ClassifyStreamRequest:
            return pb.ClassifyStreamRequest(request=classify_request([image], top_k, threshold, size, model))

        peer, stub = self._connect()
        outgoing = Outgoing(images, request)
        async with aclosing(peer.stream(stub.ClassifyStream, outgoing.requests())) as responses:
            async for response in responses:
                yield answers.stream_error(response) or answers.classifications(response.response)[0]
        outgoing.check()

    async def embed(
        self,
        images: ImageInput | Iterable[ImageInput],
        pooling: PoolingName = "auto",
        normalize: bool = False,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Turn pictures into vectors.

        Args:
            pooling: "cls", the class token, "mean", the mean of the patch tokens, or "auto", the first that it has.
            normalize: divide each vector by its Euclidean length.
        """
        request = await asyncio.to_thread(embed_request, images, pooling, normalize, **options)
        peer, stub = self._connect()
        return answers.embeddings(await peer.unary(stub.Embed, request), len(request.images))

    async def embed_stream(
        self,
        images: Iterable[ImageInput],
        pooling: PoolingName = "auto",
        normalize: bool = False,
        **options: Unpack[EmbedOptions],
    ) -> AsyncGenerator[Embeddings | MeshError, None]:
        """Embed a list of any length, one picture after another; see ``classify_stream``."""

        def request(image: ImageInput) -> pb.EmbedStreamRequest:
            return pb.EmbedStreamRequest(request=embed_request([image], pooling, normalize, **options))

        peer, stub = self._connect()
        outgoing = Outgoing(images, request)
        async with aclosing(peer.stream(stub.EmbedStream, outgoing.requests())) as responses:
            async for response in responses:
                yield answers.stream_error(response) or answers.embeddings(response.response, 1)
        outgoing.check()

    async def preprocess(
        self,
        image: ImageInput,
        preprocessor: str,
        *,
        parameters: Mapping[str, bool | float | str] = MappingProxyType({}),
        resolution: int | None = None,
        model: str = "",
    ) -> Preprocessed:
        """Make of a picture what a ControlNet is to follow.

        Args:
            preprocessor: a name that ``preprocessors()`` tells, or an alias.
            parameters: the preprocessor's; what is left out has its default.
            resolution: pixels of the shorter side that the picture is brought to first; None: it keeps its size.
            model: where one is needed; empty: the first that there is.
        """
        request = await asyncio.to_thread(preprocess_request, image, preprocessor, parameters, resolution, model)
        peer = self._connect()[0]
        stub = preprocess_service_pb2_grpc.PreprocessServiceStub(peer.channel)
        return preprocessed(await peer.unary(stub.Preprocess, request))

    async def preprocessors(self) -> tuple[Preprocessor, ...]:
        """Tell the preprocessors that there are, with their parameters."""
        peer = self._connect()[0]
        stub = preprocess_service_pb2_grpc.PreprocessServiceStub(peer.channel)
        request = preprocess_service_pb2.ListPreprocessorsRequest()
        return preprocessors((await peer.unary(stub.ListPreprocessors, request)).preprocessors)

    async def models(self) -> Models:
        """List what the mesh can run."""
        peer, stub = self._connect()
        return answers.models(await peer.unary(stub.ListModels, pb.ListModelsRequest()))

    async def load_model(self, name: str) -> Model:
        """Have a classifier of the mesh's model folders in memory as it is on the disk now.

        It may have been put there just now; one that was loaded before and has changed since is loaded again, and
        serves what is asked from then on. Where that fails, the old one goes on.
        """
        request = model_loading_service_pb2.LoadModelRequest(name=text("name", name))
        peer = self._connect()[0]
        stub = model_loading_service_pb2_grpc.ModelLoadingServiceStub(peer.channel)
        return answers.model((await peer.unary(stub.LoadModel, request)).model)

    async def unload_model(self, name: str) -> bool:
        """Drop a classifier from memory, until somebody asks for it again; answers whether it was there."""
        request = model_loading_service_pb2.UnloadModelRequest(name=text("name", name))
        peer = self._connect()[0]
        stub = model_loading_service_pb2_grpc.ModelLoadingServiceStub(peer.channel)
        return bool((await peer.unary(stub.UnloadModel, request)).changed)

    async def sampling(self) -> Sampling:
        """Tell the schedulers and the guiders that there are, with their options."""
        peer, stub = self._connect()
        return answers.sampling(await peer.unary(stub.DescribeSampling, pb.DescribeSamplingRequest()))

    def _connect(self) -> tuple[Peer, rpc.GatewayServiceStub]:
        """The channel, which belongs to the event loop that first uses it."""
        if self._closed:
            raise RuntimeError("this client is closed")
        if self._connection is None:
            peer = Peer(
                "gateway",
                self.address,
                max_message_bytes=self._max_message_bytes,
                timeout_seconds=self._timeout,
                key=self._key,
                tls=self._tls,
            )
            self._connection = peer, rpc.GatewayServiceStub(peer.channel)
        return self._connection
