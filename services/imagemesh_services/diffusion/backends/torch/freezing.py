"""What of a run a checkpoint holds, and how a run goes on from one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import check_range
from imagemesh_runtime.tensors import require_finite
from imagemesh_services.diffusion.backends.torch.object_state import Packer, Unpacker, changes, restore, snapshot
from imagemesh_services.diffusion.checkpoint import FIELD, Checkpoint, check_names
from imagemesh_services.torch_support import to_numpy

# Elements that any tensor of a checkpoint may have: a generator's state has 5056, a training schedule 1000.
_MIN_LIMIT: Final = 8192


class Freezer:
    """Knows what the run's parts were when its schedule was set.

    Args:
        watched: tells the scheduler and what the guider remembers by, under names of theirs.
        generators: the run's, one a picture.
    """

    def __init__(self, watched: Callable[[], Mapping[str, object]], generators: Sequence[torch.Generator]) -> None:
        self._watched = watched
        self._generators = generators
        self._began = {name: snapshot(thing) for name, thing in watched().items()}

    def checkpoint(self, done: int, latents: torch.Tensor) -> Checkpoint:
        """After ``done`` evaluations, at these latents."""
        packer = Packer({"latents": to_numpy(latents)})
        state: dict[str, Any] = {}
        for name, thing in self._watched().items():
            packed = changes(thing, self._began[name])
            state[name] = {key: packer.pack(value, f"{name}.{key}") for key, value in packed.items()}
        for i, generator in enumerate(self._generators):
            packer.tensors[f"generator.{i}"] = generator.get_state().numpy()
        return Checkpoint(done, state, packer.tensors)

    def restore(self, checkpoint: Checkpoint, latents: torch.Tensor, evaluations: int) -> torch.Tensor:
        """Give the parts the checkpoint's state; answers its latents, which must be of the form of ``latents``.

        Raises:
            InvalidArgument: it can't be a checkpoint of such a run, of so many evaluations.
        """
        check_range("resume_from.evaluation", checkpoint.evaluation, 0, evaluations - 1)
        limit = max(latents.numel(), 4 * evaluations, _MIN_LIMIT)
        unpacker = Unpacker(dict(checkpoint.tensors), latents.device, limit)
        found = unpacker.unpack({"tensor": "latents", "dtype": str(latents.dtype).removeprefix("torch.")}, FIELD)
        if found.shape != latents.shape:
            raise InvalidArgument(f"{FIELD}.tensors['latents'].shape", list(found.shape), str(list(latents.shape)))
        require_finite(checkpoint.tensors["latents"], f"{FIELD}.tensors['latents']")
        watched = self._watched()
        check_names(checkpoint.state, watched, f"{FIELD}.state")
        for name, thing in watched.items():
            restore(thing, checkpoint.state.get(name, {}), unpacker, f"{FIELD}.state.{name}")
        for i, generator in enumerate(self._generators):
            path = f"{FIELD}.tensors['generator.{i}']"
            try:
                generator.set_state(torch.from_numpy(unpacker.array(f"generator.{i}", "uint8", path).copy()))
            except RuntimeError as error:
                raise InvalidArgument(path, "these bytes", f"a generator's state ({error})") from error
        restored: torch.Tensor = found
        return restored
