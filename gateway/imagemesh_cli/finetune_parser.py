"""The options of ``imagemesh finetune``."""

import argparse

from imagemesh_cli.option_types import folder, folder_to_make, folders, positive, share, split, whole

TUNES = ("head", "last", "lora", "all")
SCHEDULES = ("cosine", "linear", "constant")
AUGMENTATIONS = ("zoom", "flip", "colour")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """What is learned from what, how, and where it goes."""
    parser.add_argument("model", metavar="MODEL", help="a classifier to begin with, see imagemesh models")
    parser.add_argument(
        "--data", type=folder, required=True, metavar="DIR",
        help="pictures in folders named by their labels, also within train and validation; or a saved dataset",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=folder_to_make, required=True, metavar="DIR", help="model folder to write; empty or new"
    )
    parser.add_argument(
        "--validation", type=folder, metavar="DIR", help="pictures to measure with (default: what --data has of them)"
    )
    parser.add_argument(
        "--validation-share", type=split, default=0.2, metavar="P",
        help="of each label's pictures, to measure with where there are no others (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=folders, metavar="DIR",
        help="where model folders lie, several joined as in PATH (default: the models that come with imagemesh)",
    )  # fmt: skip
    _what(parser)
    _how(parser)
    parser.add_argument(
        "--state", type=folder_to_make, metavar="DIR",
        help="where the run keeps its state and what it tells (default: .NAME.run beside -o); the same again goes on",
    )  # fmt: skip
    parser.add_argument(
        "--save-minutes", type=positive, default=5.0, metavar="N", help="work that a crash may cost (default: 5)"
    )
    parser.add_argument(
        "--floor", type=share, default=0.0, metavar="P", help="save nothing that is right more seldom (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="answer as JSON")


def _what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tune", choices=TUNES, default="last",
        help="what learns beside the new head: nothing, the last layers, low-rank additions to all layers, or"
        " everything (default: last)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=whole(1, 1000), default=2, metavar="N", help="how many, with --tune last (default: 2)"
    )
    parser.add_argument(
        "--rank", type=whole(1, 1024), default=8, metavar="N", help="of additions, with --tune lora (default: 8)"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="spend less memory and more time: compute layers again"
    )


def _how(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=whole(1, 10_000), default=20, metavar="N", help="at most (default: 20)")
    parser.add_argument("--batch", type=whole(1, 4096), default=32, metavar="N", help="of a forward (default: 32)")
    parser.add_argument(
        "--accumulate", type=whole(1, 4096), default=1, metavar="N", help="forwards of a step (default: 1)"
    )
    parser.add_argument("--lr", type=positive, metavar="RATE", help="at its peak (default: by --tune)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the rate (default: cosine)")
    parser.add_argument(
        "--warmup", type=share, default=0.1, metavar="P", help="share of the steps to rise in (default: %(default)s)"
    )
    parser.add_argument(
        "--weight-decay", type=share, default=0.02, metavar="P", help="of what multiplies (default: %(default)s)"
    )
    parser.add_argument(
        "--smoothing", type=share, default=0.1, metavar="P", help="of the labels in the loss (default: %(default)s)"
    )
    parser.add_argument(
        "--patience", type=whole(0, 10_000), default=0, metavar="N",
        help="stop after so many epochs without a better result (default: 0, never)",
    )  # fmt: skip
    parser.add_argument(
        "--augment", choices=AUGMENTATIONS, nargs="*", default=list(AUGMENTATIONS),
        help="how pictures are changed before they are learned from (default: all; none: no name)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="to compute in (default: the device's fastest)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="such as cpu or cuda:0 (default: the best)")
    parser.add_argument(
        "--workers", type=whole(0, 64), default=0, metavar="N", help="processes to read pictures (default: 0, none)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of all that is drawn (default: 0)")
