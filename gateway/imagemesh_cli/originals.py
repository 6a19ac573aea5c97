"""What the commands share that make another folder of a classifier's."""

import dataclasses
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from imagemesh_cli.rooms import SERVICES, configure
from imagemesh_runtime.errors import InvalidArgument, NotFound
from imagemesh_runtime.service import set_process_defaults

_BESIDE: Final = ("config.json", "preprocessor_config.json")  # of a model's folder, what isn't weights


class Original:
    """The model to begin with, in float32 on the CPU.

    Raises:
        NotFound: the service has no such model.
    """

    def __init__(self, args: Namespace) -> None:
        from imagemesh_runtime.registry import choose_backend
        from imagemesh_services.vit.backend import BACKENDS
        from imagemesh_services.vit.weights import FORMATS, find_weights

        self.config: Any = configure(SERVICES["vit"].config(), {"models": args.models} if args.models else {})
        self.config = dataclasses.replace(self.config, device="cpu", dtype="float32")
        backend = choose_backend(BACKENDS, "torch")(self.config)
        cards = backend.cards()
        if args.model not in cards:
            raise NotFound("model", args.model, cards)
        self.model = backend.load(args.model)
        self.folder: Path = backend.repository.folders()[args.model].path
        self.weights = find_weights(self.folder, [*FORMATS])

    def copy_beside(self, folder: Path) -> None:
        """Put what isn't weights into another folder."""
        for name in _BESIDE:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def load(self, folder: Path, engine: str) -> Any:
        """What was made of it, as a service would load it."""
        from imagemesh_runtime.registry import choose_backend
        from imagemesh_services.vit.backend import BACKENDS

        backend = choose_backend(BACKENDS, engine)(dataclasses.replace(self.config, models=str(folder.parent)))
        return backend.load(folder.name)


def begin(output: Path) -> None:
    """See that there is room for what will be made, before anything heavy is imported.

    Raises:
        InvalidArgument: the folder holds something.
    """
    set_process_defaults("WARNING")
    if output.exists() and any(output.iterdir()):
        raise InvalidArgument("-o", str(output), "a folder that is empty or not there yet")


@contextmanager
def kept_if_good(output: Path) -> Iterator[Path]:
    """A folder of another name beside ``output`` to take its place at the end of the block; an error removes it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".imagemesh-") as room:
        folder = Path(room) / "model"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
