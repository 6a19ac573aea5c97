"""The commands that make a classifier smaller or faster, and save it only if it still answers as the original does."""

import dataclasses
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from imagemesh_cli.console import print_json, progress_bar
from imagemesh_cli.rooms import SERVICES, configure
from imagemesh_client import Progress
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from imagemesh_runtime.images import decode_file
from imagemesh_runtime.service import set_process_defaults

MAX_PICTURES: Final = 2048
_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
_ENGINES: Final = {"onnx": "onnxruntime", "openvino": "openvino"}
_BESIDE: Final = ("config.json", "preprocessor_config.json")  # of a model's folder, what isn't weights


def export(args: Namespace) -> int:
    """Write a model as an ONNX or OpenVINO graph."""
    _start(args.output)
    original = _Original(args)

    def write(folder: Path) -> None:
        original.write_onnx(folder / "model.onnx")
        if args.to == "openvino":
            from imagemesh_services.vit.backends.openvino.export import export_openvino

            export_openvino(folder / "model.onnx", folder / "openvino_model.xml")
            (folder / "model.onnx").unlink()

    return original.keep(args, write, _ENGINES[args.to])


def quantize(args: Namespace) -> int:
    """Write a model as an ONNX graph with weights of 8 or 4 bits."""
    _start(args.output)
    from imagemesh_services.vit.backends.onnxruntime.quantize import SCHEMES

    original = _Original(args)
    shown = read_pictures(args.calibration) if args.calibration else original.pictures

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "model.onnx"
            original.write_onnx(whole)
            pixels = [original.model.preprocess(picture) for picture in shown]
            SCHEMES[args.scheme](whole, folder / "model.onnx", pixels)

    return original.keep(args, write, "onnxruntime")


def distill(args: Namespace) -> int:
    """Train a smaller model to answer as the given one does."""
    _start(args.output)
    import numpy as np
    import torch

    from imagemesh_training.distill import NotPlain, NotSmaller, Plan
    from imagemesh_training.distill import distill as train

    original = _Original(args)
    teacher = original.model.module
    config = teacher.config
    plan = Plan(
        layers=args.layers or max(1, getattr(config, "num_hidden_layers", 1) // 2),
        width=args.width or getattr(config, "hidden_size", 0),
        steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed,
    )  # fmt: skip
    pixels = torch.from_numpy(np.stack([original.model.preprocess(picture) for picture in original.pictures]))

    def write(folder: Path) -> None:
        with progress_bar("distilling") as show:
            student = train(teacher, pixels, plan, lambda step, loss: show(Progress(step, plan.steps)))
        student.save_pretrained(folder)

    try:
        return original.keep(args, write, "torch")
    except NotPlain as error:
        raise FailedPrecondition(f"model {args.model}: {error}") from error
    except NotSmaller as error:
        raise InvalidArgument("--layers and --width", [plan.layers, plan.width], str(error)) from error


class _Original:
    """The model to begin with, in float32 on the CPU, and the pictures that are to show what changed."""

    def __init__(self, args: Namespace) -> None:
        from imagemesh_runtime.registry import choose_backend
        from imagemesh_services.vit.backend import BACKENDS
        from imagemesh_services.vit.weights import FORMATS, find_weights

        self.config = configure(SERVICES["vit"].config(), {"models": args.models} if args.models else {})
        self.config = dataclasses.replace(self.config, device="cpu", dtype="float32")
        backend = choose_backend(BACKENDS, "torch")(self.config)
        cards = backend.cards()
        if args.model not in cards:
            raise NotFound("model", args.model, cards)
        self.pictures = read_pictures(args.images)
        self.model = backend.load(args.model)
        self.folder = backend.repository.folders()[args.model].path
        self.weights = find_weights(self.folder, [*FORMATS])

    def write_onnx(self, path: Path) -> None:
        """The model as a graph."""
        from imagemesh_services.vit.backends.torch.export import export_onnx

        export_onnx(self.model, path)

    def keep(self, args: Namespace, write: Callable[[Path], None], engine: str) -> int:
        """Have the folder written, compare, tell; raise FailedPrecondition where they disagree too often."""
        from imagemesh_runtime.registry import choose_backend
        from imagemesh_services.vit.backend import BACKENDS
        from imagemesh_services.vit.comparison import compare, weight_bytes
        from imagemesh_services.vit.weights import FORMATS, find_weights

        with _kept_if_good(args.output) as folder:
            for name in _BESIDE:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
            write(folder)
            made = choose_backend(BACKENDS, engine)(dataclasses.replace(self.config, models=str(folder.parent)))
            found = find_weights(folder, [*FORMATS])
            assert found is not None
            assert self.weights is not None
            sizes = (weight_bytes(self.weights), weight_bytes(found))
            result = compare(self.model, made.load(folder.name), self.pictures, sizes)
            saved = result.agreement >= args.floor
            _tell(result, args, saved)
            if not saved:
                raise FailedPrecondition(
                    f"they agree on {result.agreement:.1%} of the pictures, below the floor of {args.floor:.1%}:"
                    " nothing was saved"
                )
        return 0


def _tell(result: Any, args: Namespace, saved: bool) -> None:
    if args.json:
        print_json({**dataclasses.asdict(result), "floor": args.floor, "saved": saved, "folder": str(args.output)})
        return
    before, after = result.bytes_before, result.bytes_after
    low, high = result.speed_range
    print(f"size       {before / 2**20:.2f} MiB -> {after / 2**20:.2f} MiB ({after / before:.2f} of the original)")
    print(f"speed      {result.speed:.2f} times the original's ({low:.2f} to {high:.2f})")
    print(f"agreement  {result.agreement:.1%} of {result.pictures} pictures; logits differ by {result.difference:.2%}")
    if saved:
        print(f"saved in {args.output}")


def read_pictures(given: Sequence[Path]) -> list[Any]:
    """The pictures of files, and of folders with all below them, uint8 [height, width, 3] each.

    Raises:
        InvalidArgument: there is none, or more than ``MAX_PICTURES``; or a file is no picture.
    """
    files: list[Path] = []
    for path in given:
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in below if file.is_file() and (file == path or file.suffix.lower() in _SUFFIXES)]
    if not 1 <= len(files) <= MAX_PICTURES:
        raise InvalidArgument("--images", f"{len(files)} pictures", f"1 to {MAX_PICTURES} PNG, JPEG or WebP files")
    return [decode_file(file.read_bytes(), str(file)) for file in files]


def _start(output: Path) -> None:
    set_process_defaults("WARNING")
    if output.exists() and any(output.iterdir()):
        raise InvalidArgument("-o", str(output), "a folder that is empty or not there yet")


@contextmanager
def _kept_if_good(output: Path) -> Iterator[Path]:
    """A folder of another name beside ``output`` to take its place at the end of the block; an error removes it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".imagemesh-") as room:
        folder = Path(room) / "model"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
