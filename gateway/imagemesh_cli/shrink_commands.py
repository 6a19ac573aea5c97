"""The commands that make a classifier smaller or faster, and save it only if it still answers as the original does."""

import dataclasses
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from imagemesh_cli.console import print_json, progress_bar
from imagemesh_cli.originals import Original, begin, kept_if_good
from imagemesh_client import Progress
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.images import decode_file

MAX_PICTURES: Final = 2048
_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
_ENGINES: Final = {"onnx": "onnxruntime", "openvino": "openvino"}


def export(args: Namespace) -> int:
    """Write a model as an ONNX or OpenVINO graph."""
    begin(args.output)
    original = _Shown(args)

    def write(folder: Path) -> None:
        original.write_onnx(folder / "model.onnx")
        if args.to == "openvino":
            from imagemesh_services.vit.backends.openvino.export import export_openvino

            export_openvino(folder / "model.onnx", folder / "openvino_model.xml")
            (folder / "model.onnx").unlink()

    return original.keep(args, write, _ENGINES[args.to])


def quantize(args: Namespace) -> int:
    """Write a model as an ONNX graph with weights of 8 or 4 bits."""
    begin(args.output)
    from imagemesh_services.vit.backends.onnxruntime.quantize import SCHEMES

    original = _Shown(args)
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
    begin(args.output)
    import numpy as np
    import torch

    from imagemesh_training.distill import NotPlain, NotSmaller, Plan
    from imagemesh_training.distill import distill as train

    original = _Shown(args)
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


class _Shown(Original):
    """The original, and the pictures that are to show what changed."""

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.pictures = read_pictures(args.images)

    def write_onnx(self, path: Path) -> None:
        """The model as a graph."""
        from imagemesh_services.vit.backends.torch.export import export_onnx

        export_onnx(self.model, path)

    def keep(self, args: Namespace, write: Callable[[Path], None], engine: str) -> int:
        """Have the folder written, compare, tell; raise FailedPrecondition where they disagree too often."""
        from imagemesh_services.vit.comparison import compare, weight_bytes
        from imagemesh_services.vit.weights import FORMATS, find_weights

        with kept_if_good(args.output) as folder:
            self.copy_beside(folder)
            write(folder)
            found = find_weights(folder, [*FORMATS])
            assert found is not None
            assert self.weights is not None
            sizes = (weight_bytes(self.weights), weight_bytes(found))
            result = compare(self.model, self.load(folder, engine), self.pictures, sizes)
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
