"""``python -m tests.support.dying_finetune FOLDER KILL...``: fine-tune the classifier FOLDER/vit undisturbed, and for
each KILL once more in a process that is killed there and another that goes on; prints what each came to as JSON.

KILL is STEP:N, where STEP is "write" (half of a state's bytes are on the disk), "replace" or "replaced" (before and
after the new state takes the old one's place). The processes are forks of one that has its libraries, since those take
seconds.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.utils.tensorboard  # noqa: F401 - now, not in every fork
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from imagemesh_services.vit.processing import processed
from imagemesh_services.vit.processors import load_processor
from imagemesh_training.finetune import state
from imagemesh_training.finetune.parts import relabelled
from imagemesh_training.finetune.pictures import open_data
from imagemesh_training.finetune.plan import Plan
from imagemesh_training.finetune.train import Training
from tests.support.labelled import put_pictures

# With dropout, so that what is drawn counts, and three batches that make two steps an epoch.
PLAN = Plan(tune="all", epochs=2, batch=6, accumulate=2, lr=2e-3, precision="float32")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying_at(count: int, call: Callable[..., Any], last: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but at the call of that number ``last``, which is the process's last."""
    calls = 0

    def called(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < count:
            return call(*arguments)
        last(*arguments)
        return _die()

    return called


def _half(tensors: Any, path: Path, metadata: Any) -> None:
    save_file(tensors, path, metadata)
    os.truncate(path, path.stat().st_size // 2)


def _die_at(kill: str) -> None:
    step, _, count = kill.partition(":")
    replace = os.replace
    if step == "write":
        state.save_file = _dying_at(int(count), save_file, _half)
    else:
        os.replace = _dying_at(int(count), replace, replace if step == "replaced" else lambda *_: None)


def _training(folder: Path, room: Path) -> Training:
    model = AutoModelForImageClassification.from_pretrained(folder / "vit", hidden_dropout_prob=0.1)
    processor = load_processor(folder / "vit")
    data = open_data(folder / "pictures", None, 0.3, PLAN.seed)
    state.enter(room, PLAN.as_json())
    return Training(
        relabelled(model, data.names, PLAN.seed), data, PLAN, lambda picture: processed(processor, picture), room,
        save_minutes=0.0,
    )  # fmt: skip


def _run(folder: Path, room: Path, kill: str) -> None:
    training, said = _training(folder, room), []
    training.say = said.append
    if kill:
        _die_at(kill)
    outcome = training.run()
    digest = hashlib.sha256()
    for value in outcome.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    told = (room / "metrics.jsonl").read_text()
    found = {"loss": outcome.loss, "accuracy": outcome.accuracy, "weights": digest.hexdigest(), "told": told}
    (room / "found.json").write_text(json.dumps({**found, "begun": said[0]}))


def _forked(folder: Path, room: Path, kill: str = "") -> int:
    """The signal that ended the run; 0: it came to its end."""
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # never for ever
        _run(folder, room, kill)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main() -> None:
    """See the module."""
    folder = Path(sys.argv[1])
    put_pictures(folder / "pictures", 7)
    runs = {"whole": {"killed": 0, "ended": _forked(folder, folder / "whole")}}
    for kill in sys.argv[2:]:
        room = folder / kill.replace(":", "-")
        runs[kill] = {"killed": _forked(folder, room, kill), "ended": _forked(folder, room)}
    for kill, run in runs.items():
        run.update(json.loads((folder / kill.replace(":", "-") / "found.json").read_text()))
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
