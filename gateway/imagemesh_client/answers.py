"""From answers to plain values."""

import json
from collections.abc import Callable

from google.rpc import status_pb2

from imagemesh.v1 import diffusion_service_pb2, model_service_pb2, vit_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_client.types import (
    Choice,
    Classification,
    Embeddings,
    Event,
    GeneratedImage,
    Generation,
    Model,
    Models,
    Parameters,
    Prediction,
    Progress,
    Queued,
    RejectedImage,
    Result,
    Sampling,
    Timing,
)
from imagemesh_runtime.errors import RemoteError, Unavailable
from imagemesh_runtime.tensors import Array, from_proto


class Outcome:
    """Follows the events of one generation to its end."""

    def __init__(self, on_progress: Callable[[Progress], None] | None) -> None:
        self._on_progress = on_progress
        self._generation: Generation | None = None

    def note(self, event: Event) -> None:
        """Take in the next event."""
        if isinstance(event, Result):
            self._generation = event.generation
        elif isinstance(event, Progress) and self._on_progress is not None:
            self._on_progress(event)

    def generation(self) -> Generation:
        """What came of it, once the events have ended.

        Raises:
            Unavailable: they ended without a result.
        """
        if self._generation is None:
            raise Unavailable("gateway", "ended the generation without a result")
        return self._generation


def event(response: pb.GenerateResponse) -> Event | None:
    """The event in a response; None for one of a kind that this client doesn't know."""
    kind = response.WhichOneof("event")
    if kind == "queued":
        return Queued(response.queued.id, response.queued.position)
    if kind == "progress":
        return Progress(response.progress.step, response.progress.steps, tuple(response.progress.previews))
    if kind == "result":
        return Result(generation(response.result))
    return None


def generation(result: pb.GenerateResult) -> Generation:
    """The pictures, and how they came to be."""
    parameters = _parameters(result.parameters)
    images = tuple(_image(image, parameters) for image in result.images)
    rejected = tuple(
        RejectedImage(one.seed, one.index, one.reason, _seen(one.classification, parameters)) for one in result.rejected
    )
    return Generation(result.id, images, parameters, tuple(map(_timing, result.timings)), rejected)


def _image(image: pb.GeneratedImage, parameters: Parameters) -> GeneratedImage:
    classification = _seen(image.classification, parameters) if image.HasField("classification") else None
    embedding: Array | None = None
    if image.HasField("embedding"):
        embedding = from_proto(image.embedding, "embedding", dtypes=["float32"], shape=(None,)).copy()
    return GeneratedImage(image.png, image.seed, image.index, classification, embedding)


def _seen(classification: vit_service_pb2.Classification, parameters: Parameters) -> Classification:
    backend = parameters.backends.get("classify", "")
    return Classification(parameters.classifier, backend, tuple(map(_prediction, classification.predictions)))


def _parameters(parameters: pb.GenerateParameters) -> Parameters:
    return Parameters(
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        model=parameters.model,
        width=parameters.width,
        height=parameters.height,
        steps=parameters.steps,
        guidance=parameters.guidance_scale,
        scheduler=parameters.scheduler,
        seed=parameters.seed,
        clip_skip=parameters.clip_skip,
        backends=dict(parameters.backends),
        guider=parameters.guider,
        guider_options=dict(parameters.guider_options),
        lossy=dict(parameters.lossy),
        variation_seed=parameters.variation_seed if parameters.HasField("variation_seed") else None,
        variation_strength=parameters.variation_strength,
        classifier=parameters.classifier,
        embedder=parameters.embedder,
    )


def _timing(timing: pb.StageTiming) -> Timing:
    return Timing(
        stage=timing.stage,
        seconds=timing.seconds,
        compute_seconds=timing.compute_seconds,
        queue_seconds=timing.queue_seconds,
        bytes_sent=timing.bytes_sent,
        bytes_received=timing.bytes_received,
    )


def classifications(response: pb.ClassifyResponse) -> list[Classification]:
    """One a picture, in the order of the request."""
    return [
        Classification(response.model, response.backend, tuple(map(_prediction, classification.predictions)))
        for classification in response.classifications
    ]


def embeddings(response: pb.EmbedResponse, pictures: int) -> Embeddings:
    """The vectors, each the caller's own to change.

    Raises:
        InvalidArgument: they are not what an answer for so many pictures is.
    """

    def array(name: str, shape: tuple[int | None, ...], *dtypes: str) -> Array | None:
        if not response.HasField(name):  # type: ignore[arg-type]
            return None
        return from_proto(getattr(response, name), name, dtypes=dtypes, shape=shape).copy()

    vectors = from_proto(
        response.embeddings, "embeddings", dtypes=["float32", "float16", "int8"], shape=(pictures, None)
    )
    states = array("hidden_states", (None, pictures, None, None), "float32", "float16")
    scales = array("scales", (pictures,), "float32")
    maps = tuple(response.attention_maps)
    return Embeddings(response.model, response.backend, vectors.copy(), scales, states, maps)


def stream_error(response: pb.ClassifyStreamResponse | pb.EmbedStreamResponse) -> RemoteError | None:
    """Why this one of a stream's messages could not be answered; None: it was."""
    if response.WhichOneof("outcome") == "response":
        return None
    return RemoteError(status_pb2.Status(code=response.error.code, message=response.error.message))


def _prediction(prediction: vit_service_pb2.Prediction) -> Prediction:
    return Prediction(prediction.label, prediction.probability, prediction.index, prediction.logit)


def models(response: pb.ListModelsResponse) -> Models:
    """What the mesh can run."""
    return Models(tuple(map(model, response.models)), tuple(response.unreachable), tuple(response.roots))


def model(info: model_service_pb2.ModelInfo) -> Model:
    """Something that a service can run."""
    return Model(
        name=info.name,
        role=info.role,
        backend=info.backend,
        dtype=info.dtype,
        device=info.device,
        loaded=info.loaded,
        properties=dict(info.properties),
    )


def sampling(response: pb.DescribeSamplingResponse) -> Sampling:
    """The schedulers and guiders there are."""
    return Sampling(
        tuple(_choice(info, "") for info in response.schedulers),
        tuple(_choice(info, info.about) for info in response.guiders),
    )


def _choice(info: diffusion_service_pb2.SchedulerInfo | diffusion_service_pb2.GuiderInfo, about: str) -> Choice:
    options = {name: json.loads(value) for name, value in sorted(info.options.items())}
    return Choice(info.name, info.class_name, about, options, dict(sorted(info.accepts.items())))
