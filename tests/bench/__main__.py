"""``make bench``: run the benchmarks, print the table, write the JSON file."""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

from imagemesh_runtime.service import set_process_defaults


def main() -> None:
    """Measure all, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "names", nargs="*", help="latency, hops, transport, memory, batching, alone, wait, capacity; none: all"
    )
    options = parser.parse_args()

    from tests.bench import alone, batching, declared, hops, latency, memory, models, transport
    from tests.bench.harness import HEADER, Figure

    print(HEADER)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "models")
        benches = {
            "latency": lambda: latency.measure(root, options.rounds),
            "hops": lambda: hops.measure(Path(folder), options.rounds),
            "transport": lambda: transport.measure(options.rounds),
            "memory": lambda: memory.measure(root, max(2, options.rounds // 3)),
            "batching": lambda: [
                figure for side in (64, 128) for figure in batching.measure(root, models.NAME, side, options.rounds)
            ],
            "alone": lambda: alone.measure(root, models.NAME, models.SIDE, options.rounds),
            "wait": lambda: declared.wait(options.rounds),
            "capacity": lambda: declared.capacity(options.rounds),
        }
        names = options.names or list(benches)
        if {"latency", "memory", "batching", "alone"} & set(names):
            models.build(root)
        for name in names:
            for figure in benches[name]():
                figures.append(figure)
                print(figure.row(), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    options.out.write_text(json.dumps({"machine": machine, "figures": [one.as_json() for one in figures]}, indent=2))
    print(f"written to {options.out}")


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
