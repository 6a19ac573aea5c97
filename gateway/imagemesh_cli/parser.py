"""What the command understands: every command with its options, and the function that runs it, by name."""

import argparse
import json
import os
from argparse import ArgumentParser
from pathlib import Path

from imagemesh_cli.rooms import SERVICES

DEFAULT_SERVER = "127.0.0.1:50050"
STATES = ("queued", "running", "succeeded", "failed", "cancelled")
_JOBS_HELP = "Generations that the gateway keeps: they outlive the call that asked for them, and a restart."


def build_parser() -> ArgumentParser:
    """All commands and their options."""
    parser = ArgumentParser(prog="imagemesh", description="Make images and understand them with a mesh of services.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: str, help: str) -> ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    _up(command("up", "server_commands:up", "run all services and the gateway in this process"))
    _serve(command("serve", "server_commands:serve", "run one service in this process"))
    _tune(command("tune", "tune_command:tune", "measure how many rows of a batch pay here, for the diffusion service"))
    _demo(command("demo", "demo:demo", "start a mesh, make a picture, classify it, tell what each hop cost, stop"))
    _generate(command("generate", "client_commands:generate", "make pictures of a prompt"))
    _classify(command("classify", "client_commands:classify", "name what is in pictures"))
    _embed(command("embed", "client_commands:embed", "turn pictures into vectors"))
    _jobs(commands.add_parser("jobs", help="generations that the gateway keeps", description=_JOBS_HELP))
    _client(command("models", "client_commands:models", "list what the mesh can run"))
    _client(command("schedulers", "client_commands:schedulers", "list the schedulers; --json tells their options"))
    _client(command("guiders", "client_commands:guiders", "list the ways of guidance; --json tells their options"))
    return parser


def _up(parser: ArgumentParser) -> None:
    parser.add_argument("--host", help="address that the gateway listens on (default: 127.0.0.1)")
    parser.add_argument("--grpc-port", type=_port, metavar="PORT", help="default: 50050; 0: any free one")
    parser.add_argument("--http-port", type=_port, metavar="PORT", help="default: 7860; 0: any free one")
    parser.add_argument("--json", action="store_true", help="tell as JSON where it listens")
    _models_and_config(parser)


def _serve(parser: ArgumentParser) -> None:
    parser.add_argument("service", choices=[*SERVICES, "gateway"], metavar="SERVICE", help="one of %(choices)s")
    parser.add_argument("--listen", metavar="ADDRESS", help="host:port (port 0: any free one) or unix:/path")
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE",
        help="any setting of the service's configuration; repeatable",
    )  # fmt: skip
    _models_and_config(parser)


def _tune(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="default: all that the service has")
    parser.add_argument(
        "--size", type=_size, action="append", default=[], metavar="WxH", help="pixels; repeatable (default: its own)"
    )
    parser.add_argument("--max-rows", type=_count, metavar="N", help="most to try (default: the service's max_batch)")
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="forwards of each count (default: 5)")
    parser.add_argument("--json", action="store_true", help="answer as JSON")
    _models_and_config(parser)


def _models_and_config(parser: ArgumentParser) -> None:
    parser.add_argument("--models", metavar="DIR", help="folders of models, separated as in PATH")
    parser.add_argument("--backend", metavar="NAME", help="what runs the models (default: the best one installed)")
    parser.add_argument("--config", type=_file, metavar="FILE", help="TOML file, a table for each service")


def _demo(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default="a red apple", metavar="PROMPT", help='default: "%(default)s"')
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="default: 7")
    _models_and_config(parser)


def _client(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--server", type=_address, default=os.environ.get("IMAGEMESH_SERVER") or DEFAULT_SERVER, metavar="HOST:PORT",
        help=f"the gateway (default: $IMAGEMESH_SERVER or {DEFAULT_SERVER})",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="default: 600")
    parser.add_argument("--json", action="store_true", help="answer as JSON")


def _generate(parser: ArgumentParser) -> None:
    _output(parser, required=True)
    _generation(parser)
    _client(parser)


def _output(parser: ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "-o", "--output", type=_picture_to_write, required=required, metavar="FILE",
        help="where to write the picture; of several FILE-0, FILE-1...",
    )  # fmt: skip


def _jobs(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: str, help: str) -> ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=f"job_commands:{run}")
        return added

    create = command("create", "create_job", "have pictures made, and do not wait for them")
    create.add_argument("--key", default="", metavar="TEXT", help="idempotency key: the same again is the same job")
    create.add_argument("--finish-within", type=float, metavar="SECONDS", help="fail after that (default: never)")
    create.add_argument("--keep-for", type=float, metavar="SECONDS", help="once it is finished")
    _generation(create)
    listing = command("list", "list_jobs", "list jobs, the newest first")
    listing.add_argument("--state", action="append", default=[], choices=STATES, help="repeatable (default: all)")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="default: 50")
    watch = command("watch", "watch_job", "follow a job to its end, and write its pictures")
    _output(watch, required=False)
    cancel = command("cancel", "cancel_job", "cancel a job that is not finished")
    for parser_of_one in (watch, cancel):
        parser_of_one.add_argument("job", metavar="ID")
    for each in (create, listing, watch, cancel):
        _client(each)


def _generation(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT")
    add("--negative", default="", metavar="PROMPT", help="what not to show")
    add("--seed", type=int, metavar="N", help="picture i takes seed + i (default: drawn)")
    add("--variation-strength", type=float, default=0.0, metavar="X", help="0 to 1: a picture much like the seed's")
    add("--variation-seed", type=int, metavar="N", help="which one (default: drawn)")
    add("--steps", type=int, metavar="N", help="default: what suits the model, or 20")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance (default: what suits the model, or 7.5)")
    add("--size", type=_size, metavar="WxH", help="pixels (default: the model's own)")
    add("--scheduler", default="", metavar="NAME", help='such as "Euler a" (default: the model\'s own)')
    add(
        "--scheduler-option", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="such as solver_order=3 or timestep_spacing=trailing; repeatable",
    )  # fmt: skip
    add("--guider", default="", metavar="NAME", help='how guidance is done, such as "APG" or "PAG" (default: "CFG")')
    add(
        "--guider-option", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="such as guidance_rescale=0.7 or perturbed_guidance_layers=mid_block; repeatable",
    )  # fmt: skip
    add("--model", default="", metavar="NAME", help="default: the mesh's own; see imagemesh models")
    add("-n", type=int, default=1, metavar="COUNT", help="how many pictures (default: 1)")
    add("--clip-skip", type=int, default=0, metavar="N", help="layers of the text encoder to leave out")
    add("--literal-prompt", action="store_true", help="brackets are text, and neither weigh words nor change them")
    add("--image", type=_file, metavar="FILE", help="start from this picture")
    add("--strength", type=float, metavar="X", help="how much of it is made anew (default: 0.8, or 1 with --mask)")
    add("--mask", type=_file, metavar="FILE", help="redraw --image only where this picture is bright")
    add("--invert-mask", action="store_true", help="redraw where it is dark")
    add("--mask-blur", type=int, default=0, metavar="PIXELS", help="soften the mask's edge")
    add("--keep-unmasked", action="store_true", help="lay the original over the rest")
    add("--mask-padding", type=int, metavar="PIXELS", help="redraw only the masked part and so much around it")
    add("--hires", type=_scale_or_size, metavar="X|WxH", help="enlarge it in a second pass: X times, or to that size")
    add("--hires-upscaler", default="", metavar="NAME", help='"Latent" (default), "Lanczos"...')
    add("--hires-steps", type=int, metavar="N", help="default: as --steps")
    add("--hires-strength", type=float, metavar="X", help="how much is made anew (default: 0.7)")
    add("--control", type=_file, action="append", default=[], metavar="FILE", help="picture to follow; repeatable")
    add("--control-model", action="append", default=[], metavar="NAME", help="ControlNet for the control")
    add("--control-scale", type=float, action="append", default=[], metavar="X", help="its weight (default: 1)")
    add("--priority", choices=["interactive", "normal", "batch"], help="who goes first (default: normal)")


def _scale_or_size(text: str) -> float | tuple[int, int]:
    return _size(text) if "x" in text.lower() else float(text)


def _classify(parser: ArgumentParser) -> None:
    parser.add_argument("files", type=_file, nargs="+", metavar="FILE")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels for each picture (default: 5)")
    parser.add_argument("--threshold", type=float, default=0.0, metavar="P", help="leave out labels less probable")
    parser.add_argument(
        "--size", type=int, default=0, metavar="PIXELS", help="side to see pictures at (default: trained)"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="default: the mesh's own")
    _client(parser)


def _embed(parser: ArgumentParser) -> None:
    parser.add_argument("files", type=_file, nargs="+", metavar="FILE")
    parser.add_argument("--pooling", choices=["cls", "mean"], default="auto", help="default: cls where there is one")
    parser.add_argument("--dtype", choices=["float32", "float16", "int8"], default="float32", help="default: float32")
    parser.add_argument(
        "--size", type=int, default=0, metavar="PIXELS", help="side to see pictures at (default: trained)"
    )
    parser.add_argument(
        "--attention", type=_file_to_write, metavar="FILE.png", help="write what the class token looks at"
    )
    parser.add_argument("--normalize", action="store_true", help="divide each vector by its length")
    parser.add_argument("--model", default="", metavar="NAME", help="default: the mesh's own")
    parser.add_argument("-o", "--output", type=_file_to_write, metavar="FILE.npy", help="write the vectors for numpy")
    _client(parser)


def _option(text: str) -> tuple[str, bool | float | str]:
    """The value as JSON, or as the word that it is."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"not NAME=VALUE: {text}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text)


def _file_to_write(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"not a file in a folder that exists: {text}")
    return path


def _picture_to_write(text: str) -> Path:
    path = _file_to_write(text)
    if path.suffix.lower() not in ("", ".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"not a name for a PNG, JPEG or WebP file: {text}")
    return path


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"not of the form 512x512: {text}")
    return int(width), int(height)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"not a number from 1 to 4096: {text}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"not a port: {text}")
    return int(text)


def _address(text: str) -> str:
    if not text.startswith("unix:") and not text.rpartition(":")[2].isdecimal():
        raise argparse.ArgumentTypeError(f"not of the form host:port: {text}")
    return text


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"not of the form NAME=VALUE: {text}")
    return name.replace("-", "_"), value
