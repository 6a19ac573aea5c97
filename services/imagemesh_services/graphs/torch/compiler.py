"""From a model's module to a graph that an engine runs, and a stand-in for the module where the library wants one."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import diffusers
import torch
import transformers

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_services.graphs.cache import GraphCache, graphs_folder, hash_of
from imagemesh_services.graphs.engine import Engine, Graph
from imagemesh_services.graphs.torch.export import OPSET, Traced, write_onnx
from imagemesh_services.torch_support import to_numpy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """What a module is loaded from, with its hash: to be had before the module is read."""

    paths: tuple[Path, ...]
    digest: str

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Sources":
        """Of folders and files as they are now."""
        paths = tuple(paths)
        return cls(paths, hash_of(paths))

    def are_as_they_were(self) -> bool:
        """Whether that which was read since is what the hash is of."""
        try:
            return hash_of(self.paths) == self.digest
        except OSError:
            return False


class Compiler:
    """Makes graphs, or finds those that were made, and opens them with one engine."""

    def __init__(self, engine: Engine, cache: GraphCache) -> None:
        self.engine = engine
        self._cache = cache

    def compile(self, what: str, sources: Sources, trace: Callable[[], Traced]) -> Graph:
        """The graph of a module.

        Args:
            what: the module's part, such as "vae decoder": graphs of the same sources differ by it.
            sources: what the module is loaded from, had before it was.
            trace: called only if there is no graph yet.

        Raises:
            FailedPrecondition: it can't be a graph, or be kept, or be run by the engine; or its sources have changed.
        """
        versions = (torch.__version__, diffusers.__version__, transformers.__version__)
        key = hash_of((), sources.digest, what, str(OPSET), *versions)

        def write(path: Path) -> None:
            started = perf_counter()
            write_onnx(trace(), path)
            if not sources.are_as_they_were():
                raise FailedPrecondition(f"the {what}'s files were replaced while it was read; load it again")
            log.info("made a graph of the %s in %.1f s", what, perf_counter() - started)

        return self.engine.open(self._cache.find_or_make(key, write))


def open_compiler(backend: str, engine: type[Engine], config: ModelServerConfig) -> Compiler:
    """A compiler for the backend that is called so, on the device and with the cache that are configured.

    Raises:
        InvalidArgument: the engine has no such device, or graphs aren't made in that element type.
    """
    if config.dtype != "float32":
        raise InvalidArgument("dtype", config.dtype, f"float32 for backend {backend}")
    return Compiler(engine(config.device, config.threads), GraphCache(graphs_folder(config.graphs)))


def run(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs, of and as torch's tensors on the CPU."""
    return [torch.from_numpy(one) for one in graph({name: to_numpy(tensor) for name, tensor in inputs.items()})]


class Standin(torch.nn.Module):
    """In a module's place: it has the module's configuration, and lies on the CPU in float32 as that did.

    Subclasses run the graph in ``forward``.
    """

    def __init__(self, config: Any, graph: Graph) -> None:
        super().__init__()
        self.config, self.graph = config, graph
        # What the library asks for a device and an element type where it has no weights to ask.
        self.register_buffer("_place", torch.zeros(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it takes and gives tensors."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return torch.float32
