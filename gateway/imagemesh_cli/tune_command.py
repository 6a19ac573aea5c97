"""The command that measures this machine: rows of a batch for the diffusion service, or engines for all."""

import dataclasses
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from imagemesh_cli.console import print_json, print_table
from imagemesh_cli.rooms import SERVICES, configure
from imagemesh_cli.tune_engines import tune_engines
from imagemesh_runtime.errors import NotFound
from imagemesh_runtime.limits import check_size
from imagemesh_runtime.service import set_process_defaults

_HEADER = ("MODEL", "SIZE", "ROWS", "MS A ROW", "MS A FORWARD", "LIMITED BY")


def tune(args: Namespace) -> int:
    """Measure, put the knees on file, and tell them."""
    set_process_defaults("WARNING")
    if args.engines:
        return tune_engines(args)
    from imagemesh_services.diffusion.knees import knees_path, write_knees

    settings = {name: str(value) for name in ("models", "backend") if (value := getattr(args, name)) is not None}
    config = configure(SERVICES["diffusion"].config(), settings, args.config)
    found = list(_measure_all(config, args))
    path = knees_path(config)
    write_knees(path, (knee for _, knee, _ in found))
    if args.json:
        print_json([_as_json(*one) for one in found])
        return 0
    print_table(_HEADER, [_row(name, knee) for name, knee, _ in found])
    print(f"kept in {path}; a diffusion service takes it when it starts")
    beyond = max((knee.rows for _, knee, _ in found), default=0)
    if beyond > config.max_batch:
        print(f"its max_batch is {config.max_batch}: IMAGEMESH_DIFFUSION_MAX_BATCH={beyond} lets it use all of that")
    return 0


def _measure_all(config: Any, args: Namespace) -> Iterator[tuple[str, Any, Any]]:
    """(model, knee, what was measured) for every model and size that is asked for."""
    from imagemesh_runtime.registry import choose_backend
    from imagemesh_services.diffusion.backend import BACKENDS
    from imagemesh_services.diffusion.knees import Knee
    from imagemesh_services.diffusion.tuning import measure

    backend = choose_backend(BACKENDS, config.backend)(config)
    cards = backend.cards()
    if args.model and args.model not in cards:
        raise NotFound("model", args.model, cards)
    for name in [args.model] if args.model else cards:
        for width, height in _sizes(args.size, cards[name].properties):
            model = backend.load(name)
            measured = measure(model, width, height, max_rows=args.max_rows or config.max_batch, rounds=args.rounds)
            a, t = measured.seconds_a_row, measured.seconds_a_forward
            place = (model.fingerprint, backend.device, backend.dtype, width, height)
            yield name, Knee(*place, measured.rows, a, t, measured.limited_by), measured


def _sizes(asked: Sequence[tuple[int, int]], properties: Any) -> Sequence[tuple[int, int]]:
    for width, height in asked:
        check_size("width", width, int(properties["multiple"]))
        check_size("height", height, int(properties["multiple"]))
    return asked or [(int(properties["width"]), int(properties["height"]))]


def _row(name: str, knee: Any) -> tuple[str, ...]:
    milliseconds = (f"{seconds * 1e3:.2f}" for seconds in (knee.seconds_a_row, knee.seconds_a_forward))
    return (name, f"{knee.width}x{knee.height}", str(knee.rows), *milliseconds, knee.limited_by)


def _as_json(name: str, knee: Any, measured: Any) -> dict[str, Any]:
    return {"model": name, **dataclasses.asdict(knee), "seconds": measured.seconds}
