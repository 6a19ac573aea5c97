"""What the command understands: every command with its options, and the function that runs it, by name."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from imagemesh_cli.finetune_parser import add_finetune
from imagemesh_cli.generation_parser import add_generation
from imagemesh_cli.key_parser import KEYS_HELP, add_keys
from imagemesh_cli.option_types import (
    SERVER_VARIABLE,
    FromEnvironment,
    address,
    file,
    file_to_write,
    folder_to_make,
    folders,
    number,
    option,
    picture_to_write,
    port,
    positive,
    setting,
    size,
    whole,
)
from imagemesh_cli.rooms import SERVICES
from imagemesh_cli.search_parser import SEARCH_COMMANDS
from imagemesh_cli.shrink_parser import add_distill, add_export, add_quantize

DEFAULT_SERVER = "127.0.0.1:50050"
LOADING = {
    "load": "have a classifier in memory as it is on the disk now, without a restart",
    "unload": "drop a classifier from memory, until somebody asks for it again",
}
STATES = ("queued", "running", "succeeded", "failed", "cancelled")
_TLS_HELP = {
    "authority": "call by TLS; PEM of the authorities whose certificates the gateway may show, or the word system",
    "certificate": "PEM of a certificate to show, where the gateway asks for one",
    "key": "PEM of its private key",
}
_JOBS_HELP = "Generations that the gateway keeps: they outlive the call that asked for them, and a restart."


class ArgumentParser(argparse.ArgumentParser):
    """Complains in a line: the usage of some commands would fill the terminal, and hide what was wrong."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: COMMAND"):
            self.print_help(sys.stderr)
            self.exit(2)
        if message.startswith("unrecognized arguments") and " -" not in message:
            message += " (a text of several words goes in quotes)"
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells all\n")


class _Version(argparse.Action):
    """Tells the package's version, which is looked up only now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"imagemesh {version('imagemesh')}")
        parser.exit()


def build_parser() -> ArgumentParser:
    """All commands and their options."""
    parser = ArgumentParser(
        prog="imagemesh",
        description="Make images and understand them with a mesh of services.",
        epilog='First "imagemesh up"; then, in another terminal: imagemesh generate "a red apple" -o apple.png',
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="tell the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: str, help: str) -> ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    _up(command("up", "server_commands:up", "run all services and the gateway in this process"))
    _serve(command("serve", "server_commands:serve", "run one service in this process"))
    _tune(command("tune", "tune_command:tune", "measure how many rows of a batch pay here, or which engines"))
    _demo(command("demo", "demo:demo", "start a mesh, make a picture, classify it, tell what each hop cost, stop"))
    _generate(command("generate", "client_commands:generate", "make pictures of a prompt"))
    _classify(command("classify", "vision_commands:classify", "name what is in pictures"))
    _embed(command("embed", "vision_commands:embed", "turn pictures into vectors"))
    _preprocess(
        command("preprocess", "preprocess_commands:preprocess", "make of a picture what a ControlNet is to follow")
    )
    for name, (about, add) in SEARCH_COMMANDS.items():
        add(parser_of := command(name, f"search_commands:{name}", about))
        _client(parser_of)
    _make_models(command)
    _jobs(commands.add_parser("jobs", help="generations that the gateway keeps", description=_JOBS_HELP))
    add_keys(commands.add_parser("keys", help="make, list and revoke API keys", description=KEYS_HELP))
    _client(command("models", "client_commands:models", "list what the mesh can run"))
    for name, about in LOADING.items():
        _loading(command(name, f"loading_commands:{name}", about))
    _client(command("schedulers", "client_commands:schedulers", "list the schedulers; --json tells their options"))
    _client(command("guiders", "client_commands:guiders", "list the ways of guidance; --json tells their options"))
    _client(command("preprocessors", "preprocess_commands:preprocessors", "list the preprocessors for ControlNets"))
    return parser


def _make_models(command: Callable[[str, str, str], ArgumentParser]) -> None:
    add_export(command("export", "shrink_commands:export", "write a classifier as an ONNX or OpenVINO graph"))
    add_quantize(command("quantize", "shrink_commands:quantize", "write a classifier with weights of 8 or 4 bits"))
    add_distill(command("distill", "shrink_commands:distill", "train a smaller classifier to answer as a bigger one"))
    add_finetune(command("finetune", "finetune_command:finetune", "teach a classifier labels of your own"))


def _loading(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="see imagemesh models; a folder's name, no path")
    _client(parser)


def _up(parser: ArgumentParser) -> None:
    parser.add_argument("--host", help="address that the gateway listens on (default: 127.0.0.1)")
    parser.add_argument("--grpc-port", type=port, metavar="PORT", help="for gRPC (default: 50050; 0: any free one)")
    parser.add_argument("--http-port", type=port, metavar="PORT", help="for HTTP (default: 7860; 0: any free one)")
    parser.add_argument("--keys", type=file, metavar="FILE", help="take calls only with an API key of this file")
    parser.add_argument(
        "--allow-anyone", action="store_true", help="take calls without a key from other machines too (see --host)"
    )
    parser.add_argument("--json", action="store_true", help="tell as JSON where it listens")
    _models_and_config(parser)


def _serve(parser: ArgumentParser) -> None:
    parser.add_argument("service", choices=[*SERVICES, "gateway"], metavar="SERVICE", help="one of %(choices)s")
    parser.add_argument("--listen", metavar="ADDRESS", help="host:port (port 0: any free one) or unix:/path")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE",
        help="any setting of the service's configuration; repeatable",
    )  # fmt: skip
    _models_and_config(parser)


def _tune(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", metavar="MODEL", help="which to measure (default: all that the service has)"
    )
    parser.add_argument(
        "--size", type=size, action="append", default=[], metavar="WxH", help="pixels; repeatable (default: its own)"
    )
    parser.add_argument(
        "--max-rows", type=whole(1, 4096), metavar="N", help="most to try (default: the service's max_batch)"
    )
    parser.add_argument(
        "--rounds", type=whole(1, 4096), default=5, metavar="N", help="forwards of each count (default: 5)"
    )
    parser.add_argument(
        "--engines", action="store_true", help="instead, which engine runs each service's models fastest"
    )
    parser.add_argument("--json", action="store_true", help="answer as JSON")
    _models_and_config(parser)


def _models_and_config(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--models", type=folders, metavar="DIR",
        help="where model folders lie, several joined as in PATH (default: the models that come with imagemesh)",
    )  # fmt: skip
    parser.add_argument("--backend", metavar="NAME", help="what runs the models (default: the best one installed)")
    parser.add_argument("--config", type=file, metavar="FILE", help="TOML file, a table for each service")


def _demo(parser: ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", default="a red apple", metavar="PROMPT", help='what to show (default: "%(default)s")'
    )
    parser.add_argument(
        "--out", type=folder_to_make, default="out", metavar="DIR", help="where to put it (default: out)"
    )
    parser.add_argument("--seed", type=whole(0), default=7, metavar="N", help="of the picture (default: 7)")
    _models_and_config(parser)


def _client(parser: ArgumentParser) -> None:
    given = os.environ.get(SERVER_VARIABLE)
    parser.add_argument(
        "--server", type=address, default=FromEnvironment(given) if given else DEFAULT_SERVER, metavar="HOST:PORT",
        help=f"the gateway, also unix:/path (default: ${SERVER_VARIABLE} or {DEFAULT_SERVER})",
    )  # fmt: skip
    parser.add_argument(
        "--api-key", metavar="KEY", help="where the gateway wants one (default: $IMAGEMESH_API_KEY, which others of "
        "this machine don't see in the list of its processes)",
    )  # fmt: skip
    for name, what in _TLS_HELP.items():
        parser.add_argument(f"--tls-{name}", metavar="FILE", help=f"{what} (default: $IMAGEMESH_TLS_{name.upper()})")
    parser.add_argument(
        "--timeout", type=positive, default=600.0, metavar="SECONDS", help="give up after that (default: 600)"
    )
    parser.add_argument("--json", action="store_true", help="answer as JSON")


def _generate(parser: ArgumentParser) -> None:
    _output(parser, required=True)
    add_generation(parser)
    _client(parser)


def _output(parser: ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "-o", "--output", type=picture_to_write, required=required, metavar="FILE",
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
    create.add_argument("--finish-within", type=positive, metavar="SECONDS", help="fail after that (default: never)")
    create.add_argument(
        "--keep-for", type=positive, metavar="SECONDS", help="how long once it is finished (default: a day)"
    )
    add_generation(create)
    listing = command("list", "list_jobs", "list jobs, the newest first")
    listing.add_argument(
        "--state", action="append", default=[], choices=STATES, help="only those in this state; repeatable"
    )
    listing.add_argument("--limit", type=whole(1), default=50, metavar="N", help="at most so many (default: 50)")
    watch = command("watch", "watch_job", "follow a job to its end, and write its pictures")
    _output(watch, required=False)
    cancel = command("cancel", "cancel_job", "cancel a job that is not finished")
    for parser_of_one in (watch, cancel):
        parser_of_one.add_argument("job", metavar="ID", help="as imagemesh jobs create and list tell it")
    for each in (create, listing, watch, cancel):
        _client(each)


def _classify(parser: ArgumentParser) -> None:
    parser.add_argument("files", type=file, nargs="+", metavar="FILE", help="PNG, JPEG or WebP; any number")
    parser.add_argument("--top-k", type=whole(1), default=5, metavar="K", help="labels for each picture (default: 5)")
    parser.add_argument(
        "--threshold", type=number, default=0.0, metavar="P", help="leave out labels less probable, 0 to 1 (default: 0)"
    )
    parser.add_argument("--size", type=whole(1), metavar="PIXELS", help="side to see pictures at (default: as trained)")
    parser.add_argument("--model", default="", metavar="NAME", help="see imagemesh models (default: the mesh's own)")
    _client(parser)


def _embed(parser: ArgumentParser) -> None:
    parser.add_argument("files", type=file, nargs="+", metavar="FILE", help="PNG, JPEG or WebP; any number")
    parser.add_argument("--pooling", choices=["cls", "mean"], default="auto", help="default: cls where there is one")
    parser.add_argument("--dtype", choices=["float32", "float16", "int8"], default="float32", help="default: float32")
    parser.add_argument("--size", type=whole(1), metavar="PIXELS", help="side to see pictures at (default: as trained)")
    parser.add_argument(
        "--attention", type=file_to_write, metavar="FILE.png", help="write what the class token looks at"
    )
    parser.add_argument("--normalize", action="store_true", help="divide each vector by its length")
    parser.add_argument("--model", default="", metavar="NAME", help="see imagemesh models (default: the mesh's own)")
    parser.add_argument(
        "-o",
        "--output",
        type=file_to_write,
        metavar="FILE.npy",
        help="write the vectors for numpy; int8 ones with their scales, as an .npz archive",
    )
    _client(parser)


def _preprocess(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of a preprocessor; see imagemesh preprocessors")
    parser.add_argument("file", type=file, metavar="FILE", help="a picture: PNG, JPEG or WebP")
    _output(parser, required=True)
    parser.add_argument(
        "--parameter", type=option, action="append", default=[], metavar="NAME=VALUE",
        help="of the preprocessor, such as low_threshold=50; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--resolution", type=whole(1), metavar="PIXELS", help="shorter side to work at (default: as it is)"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="where one is needed (default: the first)")
    _client(parser)
