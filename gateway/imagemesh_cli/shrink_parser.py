"""The options of the commands that make a classifier smaller or faster."""

import argparse

from imagemesh_cli.option_types import file_or_folder, folder_to_make, folders, positive, share, whole

SCHEMES = ("int8-dynamic", "int8-static", "int4")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Of ``imagemesh export``."""
    _common(parser, floor=0.99)
    parser.add_argument("--to", choices=["onnx", "openvino"], default="onnx", help="format (default: onnx)")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Of ``imagemesh quantize``."""
    _common(parser, floor=0.95)
    parser.add_argument(
        "--scheme", choices=SCHEMES, default=SCHEMES[0],
        help="int8 weights and activations, scaled in every forward or by calibration; or int4 weights alone"
        " (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=file_or_folder, nargs="+", metavar="PATH",
        help="pictures that set the scales of int8-static (default: those of --images)",
    )  # fmt: skip


def add_distill(parser: argparse.ArgumentParser) -> None:
    """Of ``imagemesh distill``."""
    _common(parser, floor=0.9)
    parser.add_argument("--layers", type=whole(1), metavar="N", help="of the smaller model (default: half as many)")
    parser.add_argument("--width", type=whole(1), metavar="N", help="of its hidden states (default: the same)")
    parser.add_argument(
        "--steps", type=whole(1, 1_000_000), default=300, metavar="N", help="of training (default: 300)"
    )
    parser.add_argument(
        "--batch", type=whole(1, 1024), default=32, metavar="N", help="pictures of a step (default: 32)"
    )
    parser.add_argument("--lr", type=positive, default=5e-4, metavar="RATE", help="at its peak (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the training (default: 0)")


def _common(parser: argparse.ArgumentParser, floor: float) -> None:
    parser.add_argument("model", metavar="MODEL", help="a classifier, see imagemesh models")
    parser.add_argument(
        "-o", "--output", type=folder_to_make, required=True, metavar="DIR", help="model folder to write; empty or new"
    )
    parser.add_argument(
        "--images", type=file_or_folder, nargs="+", required=True, metavar="PATH",
        help="pictures, or folders of them, that show whether both answer alike",
    )  # fmt: skip
    parser.add_argument(
        "--floor", type=share, default=floor, metavar="P",
        help="save nothing where the likeliest label is the same for a smaller share, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=folders, metavar="DIR",
        help="where model folders lie, several joined as in PATH (default: the models that come with imagemesh)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="answer as JSON")
