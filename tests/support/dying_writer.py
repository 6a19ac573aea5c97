"""``python -m tests.support.dying_writer FOLDER STEP:N...``: put pictures into FOLDER/STEP-N's index "photos" once for
each, in a process that is killed at the Nth call of STEP; prints as JSON which signal ended which (0: it survived).

The processes are forks of one that has its libraries, since those take seconds.

STEP is "write" (half of the file's bytes are on the disk), "fsync", "replace", "replaced" (right after it) or "unlink".
"""

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from imagemesh_services.vit.backend import Pooling
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.store import IndexSpec
from imagemesh_services.vit.search.stores.embedded import EmbeddedStore
from tests.support.vectors import unit_vectors

SPEC = IndexSpec("photos", "vit", Pooling.CLS, 16)
OLD, NEW = 20, 30


def names(start: int, count: int) -> list[str]:
    """Ids of pictures."""
    return [f"picture-{i}" for i in range(start, start + count)]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(step: str, count: int) -> None:
    calls = 0

    def now() -> bool:
        nonlocal calls
        calls += 1
        return calls == count

    if step == "write":
        save = np.savez

        def torn(file: Any, **arrays: Any) -> None:
            whole = io.BytesIO()
            save(whole, **arrays)
            data = whole.getvalue()
            if now():
                file.write(data[: len(data) // 2])
                file.flush()
                _die()
            file.write(data)

        np.savez = torn  # type: ignore[assignment]
        return
    name = "replace" if step == "replaced" else step
    original = getattr(os, name)

    def call(*arguments: Any, **named: Any) -> Any:
        last = now()
        if last and step != "replaced":
            _die()
        answer = original(*arguments, **named)
        if last:
            _die()
        return answer

    setattr(os, name, call)


def _put(folder: Path, step: str, count: int) -> None:
    store = EmbeddedStore(VitConfig(index_root=str(folder / f"{step}-{count}")))
    _die_at(step, count)
    store.put(SPEC, names(OLD, NEW), unit_vectors(NEW, SPEC.width, seed=1))


def main() -> None:
    """See the module."""
    folder, ended = Path(sys.argv[1]), {}
    for argument in sys.argv[2:]:
        step, _, count = argument.partition(":")
        child = os.fork()
        if child == 0:
            _put(folder, step, int(count))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        ended[argument] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
