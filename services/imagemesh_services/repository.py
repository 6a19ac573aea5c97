"""Which folders of models a service looks into."""

import imagemesh_models
from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.registry import Repository


def open_repository(config: ModelServerConfig) -> Repository:
    """The configured folders, or the models that come with imagemesh."""
    return Repository.parse(config.models) if config.models else Repository([imagemesh_models.root()])
