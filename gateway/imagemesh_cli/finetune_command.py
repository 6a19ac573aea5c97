"""The command that teaches a classifier labels of one's own."""

from __future__ import annotations

import dataclasses
import json
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from imagemesh_cli.console import counted, print_json, progress_bar
from imagemesh_cli.originals import Original, begin, kept_if_good
from imagemesh_client import Progress
from imagemesh_runtime.errors import FailedPrecondition

if TYPE_CHECKING:
    from imagemesh_training.finetune.pictures import Data
    from imagemesh_training.finetune.plan import Plan
    from imagemesh_training.finetune.train import Outcome, Training

RECORD: Final = "finetune.json"  # in the new model's folder: what made it


def finetune(args: Namespace) -> int:
    """Train, and write the new model's folder."""
    begin(args.output)
    from imagemesh_services.fingerprint import fingerprint_of
    from imagemesh_training.finetune.pictures import check_pictures, open_data, tally
    from imagemesh_training.finetune.state import enter

    plan = _plan(args)
    data = open_data(args.data, args.validation, args.validation_share, plan.seed)
    original = Original(args)
    say: Callable[[str], None] = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    asked = {
        "model": args.model, "weights": fingerprint_of([original.folder]), "data": data.digest, **plan.as_json(),
        **_place(args, plan),
    }  # fmt: skip
    room = args.state or args.output.parent / f".{args.output.name}.run"
    enter(room, asked)
    with progress_bar("reading") as show:
        check_pictures(data, lambda done, total: show(Progress(done, total)))
    said = tally(data)
    say(f"{counted(said['train_pictures'], 'picture')} of {counted(said['labels'], 'label')} to learn from,"
        f" {said['validation_pictures']:,} to measure with; what it tells is kept in {room}")  # fmt: skip
    with progress_bar("fine-tuning") as show, _stoppable(_training(args, original, data, plan, room)) as training:
        training.tell = lambda step, steps: show(Progress(step, steps))
        training.say = say
        outcome = training.run()
    return _keep(args, original, outcome, {"model": args.model, "plan": plan.as_json(), **said}, room)


def _plan(args: Namespace) -> Plan:
    from imagemesh_training.finetune.plan import Plan

    names = [field.name for field in dataclasses.fields(Plan)]
    return Plan(**{name: getattr(args, name) for name in names} | {"augment": tuple(args.augment)})


def _place(args: Namespace, plan: Plan) -> dict[str, str]:
    """Where the run computes, and in what: elsewhere it could not go on as if it had never stopped."""
    from imagemesh_services.torch_support import pick_device
    from imagemesh_training.finetune.plan import pick_precision

    device = pick_device(args.device)
    return {"device": device.type, "dtype": str(pick_precision(plan.precision, device)).removeprefix("torch.")}


def _training(args: Namespace, original: Original, data: Data, plan: Plan, room: Path) -> Training:
    from imagemesh_services.torch_support import pick_device
    from imagemesh_training.finetune.parts import relabelled
    from imagemesh_training.finetune.train import Training

    return Training(
        relabelled(original.model.module, data.names, plan.seed), data, plan, original.model.preprocess, room,
        pick_device(args.device), save_minutes=args.save_minutes, workers=args.workers,
    )  # fmt: skip


@contextmanager
def _stoppable(training: Training) -> Iterator[Training]:
    """SIGTERM, as Kubernetes sends it, ends the run after its step with its state on the disk."""

    def stop(*_: Any) -> None:
        training.stopping = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield training
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep(args: Namespace, original: Original, outcome: Outcome, made_by: dict[str, Any], room: Path) -> int:
    """Write the folder, see that a service can load it, and tell; what the run would go on from is not needed then.

    Raises:
        FailedPrecondition: it is right too seldom.
    """
    from imagemesh_training.finetune.state import BESTS, STATE

    fields = [field.name for field in dataclasses.fields(outcome) if field.name != "model"]
    told = {**made_by, **{name: getattr(outcome, name) for name in fields}}
    if outcome.accuracy < args.floor:
        raise FailedPrecondition(
            f"it names {outcome.accuracy:.1%} rightly, below the floor of {args.floor:.1%}: nothing was saved"
        )
    with kept_if_good(args.output) as folder:
        original.copy_beside(folder)
        outcome.model.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        original.load(folder, "torch")
    for path in (room / STATE, *room.glob(BESTS)):
        path.unlink(missing_ok=True)
    if args.json:
        print_json({**told, "folder": str(args.output), "state": str(room)})
        return 0
    print(f"trained    {outcome.trained:,} of {outcome.parameters:,} parameters in {outcome.seconds:.0f} s")
    print(f"accuracy   {outcome.accuracy:.1%} of {made_by['validation_pictures']:,} pictures that it didn't learn from,"
          f" after epoch {outcome.best_epoch}")  # fmt: skip
    print(f"saved in {args.output}")
    return 0
