"""The hand-over of residuals against tritonclient with system shared memory, to a real Triton server.

Two servers own the same set, each in a process of its own on this machine: imagemesh's, and Triton with a model of its
Python backend. Both answer over gRPC with the payloads in shared memory, from arrays there to arrays here: Triton in a
region that the client registered, imagemesh in its arena.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import shared_memory

from imagemesh_runtime.tensors import Array
from tests.bench.harness import Figure, interleave, ratios
from tests.bench.owners import owner, started
from tests.bench.transport import PATIENCE, ROWS, SHAPES, Asker, residuals
from tests.support.processes import free_port
from tests.support.sizes import ROOT
from tests.support.triton import python

REGION: Final = "residuals"
_FILES: Final = ROOT / "tests" / "bench" / "triton"


def model_name(name: str) -> str:
    """The set's name as Triton allows it."""
    return name.replace(" ", "-").replace(".", "-")


def write_model(folder: Path, name: str, last: int = 0) -> None:
    """A model of Triton's that answers with the set, or with its ``last`` tensors."""
    (folder / model_name(name) / "1").mkdir(parents=True)
    shutil.copy(_FILES / "model.py", folder / model_name(name) / "1")
    outputs = [
        f'{{ name: "residual_{i}" data_type: TYPE_FP16 dims: [ {ROWS}, {channels}, {side}, {side} ] }}'
        for i, (channels, side) in enumerate(SHAPES[name][-last:])
    ]
    config = (
        f'name: "{model_name(name)}"\nbackend: "python"\nmax_batch_size: 0\n'
        'input [ { name: "timestep" data_type: TYPE_FP32 dims: [ 1 ] } ]\n'
        f"output [ {', '.join(outputs)} ]\n"
    )
    (folder / model_name(name) / "config.pbtxt").write_text(config)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A Triton server with the models of a folder; answers its gRPC address.

    Raises:
        NoTriton: there is none.
    """
    command = [str(python()), str(_FILES / "serve.py"), str(folder), str(free_port()), str(free_port())]
    with started("Triton", command, folder.with_suffix(".log")) as address:
        yield address


class Client:
    """Triton's own, with a region for all outputs of a model."""

    def __init__(self, client: triton.InferenceServerClient, name: str, arrays: list[Array], region: Any) -> None:
        self._client, self._model, self._arrays, self._memory = client, model_name(name), arrays, region
        timestep = triton.InferInput("timestep", [1], "FP32")
        self._inputs = [timestep.set_data_from_numpy(np.ones(1, np.float32))]
        self._outputs, self._offsets = [], []
        for i, array in enumerate(arrays):
            self._offsets.append(sum(one.nbytes for one in arrays[:i]))
            output = triton.InferRequestedOutput(f"residual_{i}")
            output.set_shared_memory(REGION, array.nbytes, offset=self._offsets[-1])
            self._outputs.append(output)

    def ask(self) -> list[Array]:
        """Every array, as a view of the region: good until the next question."""
        self._client.infer(self._model, self._inputs, outputs=self._outputs, client_timeout=PATIENCE)
        return [
            shared_memory.get_contents_as_numpy(self._memory, array.dtype, array.shape, offset)
            for array, offset in zip(self._arrays, self._offsets, strict=True)
        ]

    def prove(self) -> None:
        """The arrays are the server's.

        Raises:
            RuntimeError: they are not.
        """
        if not all(map(np.array_equal, self.ask(), self._arrays)):
            raise RuntimeError("other arrays came from Triton")


@contextmanager
def client(address: str, name: str, arrays: list[Array]) -> Iterator[Client]:
    """A client with its region, which is unregistered and removed afterwards."""
    size, key = sum(array.nbytes for array in arrays), f"/imagemesh_{REGION}_{os.getpid()}"
    with ExitStack() as stack:
        memory: Any = shared_memory.create_shared_memory_region(REGION, key, size)
        stack.callback(shared_memory.destroy_shared_memory_region, memory)
        asked = stack.enter_context(triton.InferenceServerClient(address))
        asked.register_system_shared_memory(REGION, key, size)
        stack.callback(asked.unregister_system_shared_memory, REGION)
        yield Client(asked, name, arrays, memory)


def measure(rounds: int, last: int = 0) -> list[Figure]:
    """Both sets, all of them, or only their ``last`` tensors.

    Raises:
        NoTriton: there is no Triton server.
    """
    python()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in SHAPES:
            write_model(Path(folder, "models"), name, last)
        theirs = stack.enter_context(server(Path(folder, "models")))
        ours = stack.enter_context(owner(f"unix:{folder}/o.sock", "tests.bench.transport"))
        for name in SHAPES:
            seconds = _compared(theirs, ours, name, rounds, last)
            what = f"against Triton, {name}"
            figures += [
                Figure.of(f"{what}: {way}", [one * 1e3 for one in taken], "ms") for way, taken in seconds.items()
            ]
            compared = ratios(seconds, "Triton", "imagemesh")
            figures.append(Figure.of(f"{what}: Triton / imagemesh", compared, "x", "> 1"))
    return figures


def _compared(theirs: str, ours: str, name: str, rounds: int, last: int) -> dict[str, list[float]]:
    arrays = residuals(SHAPES[name][-last:])
    with asyncio.Runner() as runner, client(theirs, name, arrays) as triton_client:
        triton_client.prove()
        asker = Asker(ours, "shared memory", arrays)
        runner.run(asker.open(f"{name}/{last}"))
        try:
            runner.run(asker.prove())
            arms: dict[str, Callable[[], object]] = {
                "Triton": triton_client.ask,
                "imagemesh": lambda: runner.run(asker.hand_over()),
            }
            return interleave(arms, rounds)
        finally:
            runner.run(asker.close())
