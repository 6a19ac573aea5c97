"""The client for callers without an event loop: the async one, on a thread of its own."""

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, Unpack

from imagemesh_client.aio import DEFAULT_ADDRESS, MAX_MESSAGE_BYTES, AsyncClient
from imagemesh_client.answers import Outcome
from imagemesh_client.images import ImageInput
from imagemesh_client.loop_thread import LoopThread
from imagemesh_client.preprocessing import Preprocessed, Preprocessor
from imagemesh_client.requests import GenerateOptions
from imagemesh_client.sync_jobs import Jobs
from imagemesh_client.sync_search import Indexes
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
from imagemesh_client.vision import EmbedOptions
from imagemesh_runtime.errors import MeshError


class Client:
    """A gateway at ``host:port`` or ``unix:/path``; methods, errors and options are those of ``AsyncClient``.

    It may be shared by threads. An interrupt (Ctrl-C) during a call cancels the call.
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
        self._async = AsyncClient(
            address,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            key=key,
            tls_authority=tls_authority,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
        )
        self._thread = LoopThread(self._async)
        self.jobs = Jobs(self._async.jobs, self._thread)
        self.indexes = Indexes(self._async.indexes, self._thread)
        # Also at interpreter exit, since a forgotten client must not die in the middle of its loop.
        self._close = weakref.finalize(self, self._thread.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the calls under way and the connection."""
        self._close()

    def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generator[Event, None, None]:
        """Generate, and tell how it goes; leaving the iterator cancels the generation."""
        return self._thread.iterate(self._async.stream(prompt, **options))

    def generate(
        self,
        prompt: str,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Make pictures of a prompt; ``on_progress`` is called after each step, on the caller's thread."""
        outcome = Outcome(on_progress)
        with closing(self.stream(prompt, **options)) as events:
            for event in events:
                outcome.note(event)
        return outcome.generation()

    def classify(
        self,
        images: ImageInput | Iterable[ImageInput],
        top_k: int = 5,
        *,
        threshold: float = 0.0,
        size: int | None = None,
        model: str = "",
    ) -> list[Classification]:
        """Name what is in each picture with its ``top_k`` likeliest labels of at least ``threshold`` probability."""
        return self._thread.run(self._async.classify(images, top_k, threshold=threshold, size=size, model=model))

    def classify_stream(
        self,
        images: Iterable[ImageInput],
        top_k: int = 5,
        *,
        threshold: float = 0.0,
        size: int | None = None,
        model: str = "",
    ) -> Generator[Classification | MeshError, None, None]:
        """Classify a list of any length, in its order; see ``AsyncClient.classify_stream``."""
        return self._thread.iterate(
            self._async.classify_stream(images, top_k, threshold=threshold, size=size, model=model)
        )

    def embed(
        self,
        images: ImageInput | Iterable[ImageInput],
        pooling: PoolingName = "auto",
        normalize: bool = False,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Turn pictures into vectors; see ``AsyncClient.embed``."""
        return self._thread.run(self._async.embed(images, pooling, normalize, **options))

    def embed_stream(
        self,
        images: Iterable[ImageInput],
        pooling: PoolingName = "auto",
        normalize: bool = False,
        **options: Unpack[EmbedOptions],
    ) -> Generator[Embeddings | MeshError, None, None]:
        """Embed a list of any length, one picture after another; see ``AsyncClient.classify_stream``."""
        return self._thread.iterate(self._async.embed_stream(images, pooling, normalize, **options))

    def preprocess(
        self,
        image: ImageInput,
        preprocessor: str,
        *,
        parameters: Mapping[str, bool | float | str] = MappingProxyType({}),
        resolution: int | None = None,
        model: str = "",
    ) -> Preprocessed:
        """Make of a picture what a ControlNet is to follow; see ``AsyncClient.preprocess``."""
        return self._thread.run(
            self._async.preprocess(image, preprocessor, parameters=parameters, resolution=resolution, model=model)
        )

    def preprocessors(self) -> tuple[Preprocessor, ...]:
        """Tell the preprocessors that there are, with their parameters."""
        return self._thread.run(self._async.preprocessors())

    def models(self) -> Models:
        """List what the mesh can run."""
        return self._thread.run(self._async.models())

    def load_model(self, name: str) -> Model:
        """Have a classifier in memory as it is on the disk now; see ``AsyncClient.load_model``."""
        return self._thread.run(self._async.load_model(name))

    def unload_model(self, name: str) -> bool:
        """Drop a classifier from memory; see ``AsyncClient.unload_model``."""
        return self._thread.run(self._async.unload_model(name))

    def sampling(self) -> Sampling:
        """Tell the schedulers and the guiders that there are, with their options."""
        return self._thread.run(self._async.sampling())
