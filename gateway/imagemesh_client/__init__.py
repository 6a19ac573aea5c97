"""The Python SDK of imagemesh.

    from imagemesh_client import Client

    with Client("127.0.0.1:50050") as mesh:
        mesh.generate("a red fox in the snow", seed=7).images[0].save("fox.png")

``AsyncClient`` has the same methods to await. Every failure is a ``MeshError``: its ``code`` is gRPC's, its text says
what is wrong with which field or service, and ``to_status().details`` holds the details of ``google.rpc.Status``.
"""

from imagemesh_client.aio import AsyncClient
from imagemesh_client.images import ImageInput
from imagemesh_client.job_types import Job, JobFailure, JobOptions
from imagemesh_client.preprocessing import Preprocessed, Preprocessor, PreprocessorParameter
from imagemesh_client.requests import GenerateOptions
from imagemesh_client.search import Clustering, Duplicate, Group, Index, Match
from imagemesh_client.sync import Client
from imagemesh_client.types import (
    Choice,
    Classification,
    Classify,
    Control,
    ControlSavings,
    Embed,
    Embeddings,
    Event,
    GeneratedImage,
    Generation,
    Hires,
    Keep,
    Model,
    Models,
    Parameters,
    Prediction,
    Progress,
    Queued,
    Reference,
    RejectedImage,
    Result,
    Sampling,
    Timing,
)
from imagemesh_client.vision import EmbedOptions
from imagemesh_runtime.errors import DeadlineExceeded, InvalidArgument, MeshError, RemoteError, Unavailable

__all__ = [
    "AsyncClient",
    "Choice",
    "Classification",
    "Classify",
    "Client",
    "Clustering",
    "Control",
    "ControlSavings",
    "DeadlineExceeded",
    "Duplicate",
    "Embed",
    "EmbedOptions",
    "Embeddings",
    "Event",
    "GenerateOptions",
    "GeneratedImage",
    "Generation",
    "Group",
    "Hires",
    "ImageInput",
    "Index",
    "InvalidArgument",
    "Job",
    "JobFailure",
    "JobOptions",
    "Keep",
    "Match",
    "MeshError",
    "Model",
    "Models",
    "Parameters",
    "Prediction",
    "Preprocessed",
    "Preprocessor",
    "PreprocessorParameter",
    "Progress",
    "Queued",
    "Reference",
    "RejectedImage",
    "RemoteError",
    "Result",
    "Sampling",
    "Timing",
    "Unavailable",
]
