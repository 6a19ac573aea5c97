"""The part of ``imagemesh tune`` that finds the fastest engine of each model."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from statistics import median
from typing import Any, Final

from imagemesh_cli.console import print_json, print_table
from imagemesh_cli.rooms import SERVICES, configure
from imagemesh_runtime.errors import NotFound

_HEADER = ("SERVICE", "MODEL", "ENGINE", "MS", "TIMES AS FAST", "FROM", "TO", "")
# Whose tables are of engines that do the same; classifiers are run by what their format is for.
ROLES: Final = ("diffusion", "text-encoder", "vae", "controlnet")


@dataclass(frozen=True)
class _Found:
    service: str
    timed: Any


def tune_engines(args: Namespace) -> int:
    """Measure, put each service's choices on file, and tell them."""
    from imagemesh_services.choices import choices_path, write_choices

    found, path = [], None
    sizes: dict[str, tuple[int, int]] = {}
    for service in ROLES:
        table = resolve_name(f"{SERVICES[service].package}.backend:BACKENDS")
        settings = {"models": str(args.models)} if args.models else {}
        config = configure(SERVICES[service].config(), settings, args.config)
        path = choices_path(config)
        measured = list(_measure(table, config, service, args, sizes))
        found += [_Found(service, timed) for timed, _ in measured]
        write_choices(path, [timed.choice(table, config, first) for timed, first in measured])
    if args.model and args.model not in sizes:
        raise NotFound("model", args.model, sorted(sizes))
    assert path is not None
    if args.json:
        print_json([{"service": one.service, "model": one.timed.model, "engine": one.timed.engine,
                     "seconds": dict(one.timed.seconds)} for one in found])  # fmt: skip
        return 0
    print_table(_HEADER, [row for one in found for row in _rows(one)])
    print(f"kept in {path}; services whose backend is auto take it when they start")
    return 0


def _measure(
    table: Any, config: Any, service: str, args: Namespace, sizes: dict[str, tuple[int, int]]
) -> Iterator[tuple[Any, Any]]:
    """What was measured, and the first engine, for every model of the service that is asked for.

    Other parts of a pipeline are measured at the size that the diffusion service, which comes first, tells of it.
    """
    from imagemesh_services.measuring import open_engines, time_engines

    trial = resolve_name(f"{SERVICES[service].package}.trial:trial")
    engines = open_engines(table, config)
    first = next(iter(engines.values()))
    for name, card in first.cards().items():
        own = tuple(int(card.properties.get(side, 512)) for side in ("width", "height"))
        width, height = args.size[0] if args.size else sizes.setdefault(name, (own[0], own[1]))
        sizes[name] = (width, height)
        if args.model in ("", name):
            timed = time_engines(engines, name, partial(trial, width=width, height=height), args.rounds)
            if timed is None:
                print(f"{service}: {name} is left out: no engine can do it", file=sys.stderr)
                continue
            yield timed, first


def _rows(one: _Found) -> Iterator[tuple[str, ...]]:
    for engine, seconds in one.timed.seconds.items():
        ratios = one.timed.ratios(engine)
        spread = (f"{value:.2f}" for value in (median(ratios), min(ratios), max(ratios)))
        chosen = "chosen" if engine == one.timed.engine else ""
        yield (one.service, one.timed.model, engine, f"{median(seconds) * 1e3:.2f}", *spread, chosen)
