"""The options that say what to generate, in groups as help shows them."""

from argparse import ArgumentParser

from imagemesh_cli.option_types import file, number, option, positive, preprocessor, scale_or_size, share, size, whole


def add_generation(parser: ArgumentParser) -> None:
    """What ``imagemesh generate`` and ``imagemesh jobs create`` have in common."""
    parser.add_argument("prompt", metavar="PROMPT", help="what to show; several words in quotes")
    _picture(parser)
    _sampling(parser)
    _source(parser)
    _second_pass(parser)
    _controls(parser)
    _references(parser)
    _looks(parser)


def _picture(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--negative", default="", metavar="PROMPT", help="what not to show")
    add("--model", default="", metavar="NAME", help="see imagemesh models (default: the mesh's own)")
    add("--size", type=size, metavar="WxH", help="pixels, such as 64x64 (default: the model's own)")
    add("-n", type=whole(1), default=1, metavar="COUNT", help="how many pictures (default: 1)")
    add("--seed", type=whole(0), metavar="N", help="the same again is the same picture; the i-th takes seed + i "
        "(default: drawn)")  # fmt: skip
    add("--steps", type=whole(1), metavar="N", help="default: what suits the model, or 20")
    add(
        "--guidance",
        type=number,
        metavar="X",
        help="how much the prompt counts (default: what suits the model, or 7.5)",
    )
    add("--priority", choices=["interactive", "normal", "batch"], help="who goes first (default: normal)")


def _sampling(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("how it is drawn").add_argument
    add("--scheduler", default="", metavar="NAME", help='such as "Euler a"; see imagemesh schedulers (default: the '
        "model's own)")  # fmt: skip
    add(
        "--scheduler-option", type=option, action="append", default=[], metavar="NAME=VALUE",
        help="such as solver_order=3 or timestep_spacing=trailing; repeatable",
    )  # fmt: skip
    add("--guider", default="", metavar="NAME", help='how guidance is done, such as "APG" or "PAG"; see imagemesh '
        'guiders (default: "CFG")')  # fmt: skip
    add(
        "--guider-option", type=option, action="append", default=[], metavar="NAME=VALUE",
        help="such as guidance_rescale=0.7 or perturbed_guidance_layers=mid_block; repeatable",
    )  # fmt: skip
    add("--variation-strength", type=number, default=0.0, metavar="X", help="0 to 1: a picture much like the seed's")
    add("--variation-seed", type=whole(0), metavar="N", help="which of these (default: drawn)")
    add("--clip-skip", type=whole(0), default=0, metavar="N", help="last layers of the text encoder to leave out "
        "(default: 0)")  # fmt: skip
    add("--literal-prompt", action="store_true", help="brackets are text, and neither weigh words nor change them")


def _source(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("start from a picture, or redraw a part of one").add_argument
    add("--image", type=file, metavar="FILE", help="start from this picture")
    add("--strength", type=positive, metavar="X", help="how much of it is made anew, to 1 (default: 0.8, or 1 with "
        "--mask)")  # fmt: skip
    add("--mask", type=file, metavar="FILE", help="redraw --image only where this picture is bright")
    add("--invert-mask", action="store_true", help="redraw where it is dark")
    add("--mask-blur", type=whole(0), default=0, metavar="PIXELS", help="soften the mask's edge (default: 0)")
    add("--keep-unmasked", action="store_true", help="lay the original over the rest")
    add("--mask-padding", type=whole(0), metavar="PIXELS", help="redraw only the masked part and so much around it")


def _second_pass(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("enlarge it in a second pass").add_argument
    add("--hires", type=scale_or_size, metavar="X|WxH", help="X times as large, or to that size")
    add("--hires-upscaler", default="", metavar="NAME", help='such as "Lanczos" (default: "Latent")')
    add("--hires-steps", type=whole(1), metavar="N", help="default: as --steps")
    add("--hires-strength", type=positive, metavar="X", help="how much is made anew, to 1 (default: 0.7)")


def _controls(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("ControlNets, in the order of their pictures").add_argument
    add("--control", type=file, action="append", default=[], metavar="FILE", help="picture to follow; repeatable")
    add("--control-model", action="append", default=[], metavar="NAME", help="ControlNet for it (default: the mesh's "
        "own)")  # fmt: skip
    add("--control-scale", type=number, action="append", default=[], metavar="X", help="its weight (default: 1)")
    add("--control-start", type=number, action="append", default=[], metavar="X", help="part of the steps from which "
        "it steers (default: 0)")  # fmt: skip
    add("--control-end", type=number, action="append", default=[], metavar="X", help="and up to which (default: 1)")
    add(
        "--control-blocks",
        type=_weights,
        action="append",
        default=[],
        metavar="X,X...",
        help="weights of its residuals",
    )
    add(
        "--control-preprocessor", type=preprocessor, action="append", default=[], metavar="NAME[:PARAMETER=VALUE,...]",
        help="what draws of it what is followed, such as canny or canny:low_threshold=50 (default: none)",
    )  # fmt: skip
    add("--control-type", action="append", default=[], metavar="NAME", help="of a ControlNet-union: which kind of "
        "picture it is, such as canny or depth")  # fmt: skip
    add("--control-reuse", type=whole(1), default=1, metavar="N", help="ask the ControlNets at every N-th step, which "
        "changes the picture (default: at each)")  # fmt: skip
    add(
        "--control-conditional-only",
        action="store_true",
        help="steer the prompt's half alone, which changes the picture",
    )
    add("--control-rounding", choices=["int8", "fp8"], default="", help="send residuals in 8 bits, which changes the "
        "picture")  # fmt: skip
    add("--guess-mode", action="store_true", help="the pictures count more than the prompt")


def _references(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("pictures to be like (IP-Adapter), in their order").add_argument
    add("--reference", type=file, action="append", default=[], metavar="FILE", help="picture; repeatable")
    add("--reference-adapter", action="append", default=[], metavar="NAME", help="IP-Adapter for it (default: the "
        "mesh's first)")  # fmt: skip
    add("--reference-scale", type=number, action="append", default=[], metavar="X", help="how much it counts, 0 to 10 "
        "(default: 1)")  # fmt: skip


def _looks(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("look at what was made").add_argument
    add("--classify", type=whole(1, 1000), metavar="K", help="tell the K likeliest labels of each picture")
    add("--classify-model", default="", metavar="NAME", help="see imagemesh models (default: the mesh's own)")
    add("--embed", action="store_true", help="tell each picture's vector: with --json, and beside it as .npy")
    add("--embed-model", default="", metavar="NAME", help="see imagemesh models (default: the mesh's own)")
    add("--keep", metavar="LABEL", help="keep only pictures whose likeliest label is this")
    add("--keep-among", type=whole(1, 1000), default=1, metavar="K", help="or is among the K likeliest (default: 1)")
    add("--keep-probability", type=share, default=0.0, metavar="P", help="with at least this probability (default: 0)")
    add("--retries", type=whole(0), default=0, metavar="N", help="how often to draw another picture in the place of "
        "one that isn't kept, up to 8 (default: 0)")  # fmt: skip


def _weights(text: str) -> list[float]:
    return [number(one) for one in text.split(",")]
