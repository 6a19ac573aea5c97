"""What the command writes: results on stdout, progress and complaints on stderr."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from imagemesh_client import Client, Progress, Timing


def connected(args: Namespace) -> Client:
    """A client of the gateway that the command's options name."""
    return Client(
        args.server,
        timeout=args.timeout,
        key=args.api_key,
        tls_authority=args.tls_authority,
        tls_certificate=args.tls_certificate,
        tls_key=args.tls_key,
    )


def print_json(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as what is in them; those in which no row has anything are left out."""
    told = list(rows)
    kept = [i for i in range(len(header)) if not told or any(row[i] for row in told)]
    table = [tuple(row[i] for i in kept) for row in (header, *told)]
    widths = [max(len(row[i]) for row in table) for i in range(len(kept))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_timings(timings: Iterable[Timing]) -> None:
    """What each hop cost."""
    rows = [
        (
            timing.stage,
            f"{timing.seconds * 1e3:.1f}",
            f"{timing.compute_seconds * 1e3:.1f}",
            f"{timing.queue_seconds * 1e3:.1f}",
            f"{timing.bytes_sent:,}",
            f"{timing.bytes_received:,}",
        )
        for timing in timings
    ]
    print_table(("HOP", "MS", "COMPUTE MS", "QUEUED MS", "BYTES SENT", "BYTES RECEIVED"), rows)


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"imagemesh: {' '.join(message.split())}", file=sys.stderr)


def counted(count: int, thing: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[Progress], None]]:
    """A callback that moves a bar on stderr, if that is a terminal and rich is installed; else it does nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda progress: bar.update(task, completed=progress.step, total=progress.steps)
