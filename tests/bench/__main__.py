"""``make bench``: run the benchmarks, print the table, write the JSON file."""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from imagemesh_runtime.service import set_process_defaults

if TYPE_CHECKING:
    from tests.bench.harness import Figure


def main() -> None:
    """Measure all, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "names",
        nargs="*",
        help="latency, hops, transport, triton, several, stall, overlap, memory, batching, alone, backends, wait, "
        "capacity; none: all, the one against Triton if `make triton` has been run",
    )
    options = parser.parse_args()

    from tests.bench.harness import HEADER

    print(HEADER)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for figure in _measured(Path(folder), options.names, options.rounds):
            figures.append(figure)
            print(figure.row(), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": _machine(), "figures": [one.as_json() for one in figures]}, indent=2))
    print(f"written to {options.out}")


def _measured(folder: Path, names: list[str], rounds: int) -> "Iterator[Figure]":
    from tests.bench import models
    from tests.support.triton import NoTriton

    root = folder / "models"
    benches = _benches(folder, root, rounds)
    if {"latency", "memory", "batching", "alone", "backends"} & set(names or benches):
        models.build(root)
    for name in names or benches:
        try:
            yield from benches[name]()
        except NoTriton as error:
            if names:
                sys.exit(str(error))
            print(error)


def _benches(folder: Path, root: Path, rounds: int) -> "Mapping[str, Callable[[], list[Figure]]]":
    from tests.bench import (
        against_triton,
        alone,
        backends,
        batching,
        declared,
        hops,
        latency,
        memory,
        models,
        overlap,
        several,
        stall,
        transport,
    )

    return {
        "latency": lambda: latency.measure(root, rounds),
        "hops": lambda: hops.measure(folder, rounds),
        "transport": lambda: transport.measure(rounds),
        "triton": lambda: against_triton.measure(rounds),
        "several": lambda: several.measure(),
        "stall": lambda: stall.measure(rounds),
        "overlap": lambda: overlap.measure(rounds),
        "memory": lambda: memory.measure(root, max(2, rounds // 3)),
        "batching": lambda: [
            figure for side in (64, 128) for figure in batching.measure(root, models.NAME, side, rounds)
        ],
        "alone": lambda: alone.measure(root, models.NAME, models.SIDE, rounds),
        "backends": lambda: backends.measure(root, models.NAME, models.SIDE, rounds),
        "wait": lambda: declared.wait(rounds),
        "capacity": lambda: declared.capacity(rounds),
    }


def _machine() -> dict[str, object]:
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


def _quieten() -> None:
    """Leave the terminal to the figures: no bars and no advice of the libraries, here and in the servers that start."""
    set_process_defaults("WARNING")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    _quieten()
    main()
