"""The command ``imagemesh``: runs what was asked for, and says in one line what went wrong.

What a command needs is imported when it runs: help is quick, and client commands need no service's libraries.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pkgutil import resolve_name

from imagemesh_cli.parser import build_parser

# Of packages that the extra "all" doesn't bring, the extra that does.
_EXTRAS = {"openvino": "openvino", "peft": "finetune", "datasets": "finetune", "pyarrow": "parquet"}
EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the answer is the process's exit code."""
    args = build_parser().parse_args(argv)
    # gRPC's core would write its own story beside our one line; it reads this when it is first imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code: int = resolve_name(f"imagemesh_cli.{args.run}")(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        return _report(error)
    return code


def _report(error: Exception) -> int:
    """Say in one line what went wrong; the answer is the exit code for it."""
    if os.environ.get("IMAGEMESH_LOG_LEVEL", "").upper() == "DEBUG":
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get(str(error.name), "all")
        print(f"imagemesh: needs the package {error.name}: pip install 'imagemesh[{extra}]'", file=sys.stderr)
        return EXIT_FAILURE
    from grpc import StatusCode

    from imagemesh_cli.console import complain
    from imagemesh_runtime.errors import MeshError, Unavailable

    if isinstance(error, Unavailable) and error.service == "gateway":
        complain(f"{error}; is it running (imagemesh up)?")
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        complain(f"{os.fsdecode(error.filename)}: {error.strerror}")
    elif isinstance(error, MeshError | OSError):
        complain(str(error))
    else:
        complain(f"unforeseen {type(error).__name__}: {error} (IMAGEMESH_LOG_LEVEL=DEBUG shows where)")
    usage = isinstance(error, MeshError) and error.code in (StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND)
    return EXIT_USAGE if usage else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
