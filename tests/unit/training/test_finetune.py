"""What learns and what stays; and a run that is gone on with ends where an undisturbed one does."""

import copy
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_training.finetune import parts
from imagemesh_training.finetune.pictures import Data, open_data
from imagemesh_training.finetune.plan import Plan, pick_precision
from imagemesh_training.finetune.state import State, enter
from imagemesh_training.finetune.train import Outcome, Stopped, Training
from tests.support.labelled import put_pictures
from tests.support.sizes import ROOT
from tests.support.tiny_vision import BUILDERS

FAMILIES = ("vit", "deit", "swin", "convnext", "dinov2", "resnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifiers")
    for name in FAMILIES:
        BUILDERS[name](root / name)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return open_data(put_pictures(tmp_path_factory.mktemp("pictures"), 10), None, 0.2, seed=0)


def preprocess(picture: np.ndarray) -> np.ndarray:
    return (picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)


def load(folders: Path, name: str) -> Any:
    return AutoModelForImageClassification.from_pretrained(folders / name).eval()


@pytest.fixture
def train(folders: Path, data: Data, tmp_path: Path) -> Callable[..., tuple[dict, Outcome]]:
    """Trains a tiny classifier; answers its weights before, with the new head, and what came of it."""

    def call(name: str = "vit", room: str = "run", stop: int = 0, **asked: Any) -> tuple[dict, Outcome]:
        plan = Plan(**{"epochs": 1, "batch": 8, "precision": "float32", **asked})
        model = parts.relabelled(load(folders, name), data.names, plan.seed)
        before = copy.deepcopy(model.state_dict())
        enter(tmp_path / room, plan.as_json())
        training = Training(model, data, plan, preprocess, tmp_path / room)
        if stop:
            training.tell = lambda step, steps: setattr(training, "stopping", step == stop)
        return before, training.run()

    return call


def changed_of(before: dict, outcome: Outcome) -> set[str]:
    after = outcome.model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_backbone_keeps_every_weight_and_statistic(train, name):
    before, outcome = train(name, tune="head")
    changed = changed_of(before, outcome)
    prefix = f"{outcome.model.base_model_prefix}."
    heads = {key for key in before if not key.startswith(prefix) and not key.endswith("num_batches_tracked")}
    assert changed == heads
    assert outcome.trained == sum(before[key].numel() for key in heads)


@pytest.mark.parametrize(
    ("name", "layer", "beside"),
    [
        ("vit", "vit.layers.2.", ("classifier.", "vit.layernorm.")),
        ("swin", "swin.encoder.layers.1.", ("classifier.", "swin.layernorm.")),
        ("resnet", "resnet.encoder.stages.1.", ("classifier.",)),
    ],
)
def test_of_the_last_layer_all_changes_and_of_those_before_nothing(train, name, layer, beside):
    before, outcome = train(name, tune="last", layers=1)
    changed = changed_of(before, outcome)
    assert {key for key in before if key.startswith(layer)} - changed <= {
        key for key in before if key.endswith(("num_batches_tracked", "relative_position_index"))
    }
    assert {key for key in changed if not key.startswith((layer, *beside))} == set()


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_low_rank_additions_change_the_layers_alone_and_end_in_plain_weights(train, folders, name):
    before, outcome = train(name, tune="lora", rank=2)
    changed, layers = changed_of(before, outcome), parts.layers_of(outcome.model)
    weights = {id(value) for value in layers.parameters()}
    inside = {key for key, value in outcome.model.named_parameters() if id(value) in weights}
    backbone = {key for key in changed if key.startswith(f"{outcome.model.base_model_prefix}.")}
    assert backbone
    assert backbone <= {key for key in inside if before[key].ndim > 1}
    for key in backbone:
        if before[key].ndim == 2:
            assert torch.linalg.matrix_rank(outcome.model.state_dict()[key] - before[key], rtol=1e-3) <= 2
    assert type(outcome.model) is type(load(folders, name))


def test_it_learns_to_tell_what_it_never_saw(train):
    _, outcome = train(tune="all", epochs=4)
    assert outcome.accuracy == 1
    assert outcome.model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert not outcome.model.training


def test_forwards_of_a_step_count_as_one_batch_however_uneven_they_are(train):
    before, whole = train(room="whole", batch=24, augment=())
    _, parted = train(room="parted", batch=16, accumulate=2, augment=())
    assert whole.steps == parted.steps == 1
    moved = off = 0.0
    for name, one in whole.model.named_parameters():
        moved += float((one - before[name]).abs().sum())
        off += float((one - parted.model.get_parameter(name)).abs().sum())
    assert 0 < off < 0.01 * moved  # of a gradient that is nothing but rounding the optimizer makes a step as well


def test_computing_layers_again_changes_no_step(train):
    plain, again = (train(room=f"{on}", tune="all", checkpointing=on)[1] for on in (False, True))
    for one, two in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_the_rate_warms_up_and_falls_and_what_is_told_is_on_file_for_people_and_tensorboard(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, outcome = train(epochs=4, warmup=0.25)
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train_rate"] for line in told if "train_rate" in line]
    assert len(rates) == outcome.steps == 12
    assert rates[0] < rates[2] == max(rates) == Plan(tune="last").rate
    assert rates[2:] == sorted(rates[2:], reverse=True)
    accuracies = [line["accuracy"] for line in told if "accuracy" in line]
    assert [line["epoch"] for line in told if "accuracy" in line] == [1, 2, 3, 4]
    assert max(accuracies) == outcome.accuracy
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [round(one.value, 5) for one in board.Scalars("accuracy")] == [round(one, 5) for one in accuracies]
    assert [one.step for one in board.Scalars("train/loss")] == list(range(1, 13))


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(train, tmp_path):
    _, outcome = train(epochs=9, patience=2, lr=1e-12)
    assert (outcome.epochs, outcome.best_epoch) == (3, 1)
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = next(line for line in told if "accuracy" in line)
    assert (best["accuracy"], best["validation_loss"]) == (outcome.accuracy, outcome.loss)


def test_a_run_that_was_told_to_stop_is_gone_on_with(train):
    _, whole = train(room="whole", epochs=2)
    with pytest.raises(Stopped, match="stopped at step 4 of 6"):
        train(epochs=2, stop=4)
    _, rest = train(epochs=2)
    assert (rest.loss, rest.accuracy, rest.steps) == (whole.loss, whole.accuracy, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_a_run_that_was_told_to_stop_while_it_measures_is_gone_on_with(train, monkeypatch):
    _, whole = train(room="whole", epochs=2)
    validate = Training._validate

    def stopped(self, learner):
        self.stopping = True
        return validate(self, learner)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_validate", stopped)
        with pytest.raises(Stopped, match="stopped at step 3 of 6"):
            train(epochs=2)
    _, rest = train(epochs=2)
    assert (rest.loss, rest.accuracy, rest.steps) == (whole.loss, whole.accuracy, 6)


def test_the_best_weights_that_a_state_names_stay_until_another_names_others(train, tmp_path, monkeypatch):
    keep, kept = State.keep_best, []

    def killed(self):
        keep(self)
        kept.append(self.position.best_epoch)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "keep_best", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tune="all", epochs=4)
    found = {path.name for path in (tmp_path / "run").glob("best*")}
    assert found == {f"best-{epoch}.safetensors" for epoch in kept}
    _, outcome = train(tune="all", epochs=4)
    assert [path.name for path in (tmp_path / "run").glob("best*")] == [f"best-{outcome.best_epoch}.safetensors"]


def test_a_state_that_a_library_can_not_take_up_is_named(train, monkeypatch):
    """As a scaler's of a GPU is where there is none; and a GPU that isn't computed on is let alone."""

    def refuse(*_):
        raise RuntimeError("The source state dict is empty")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
    with pytest.raises(Stopped):
        train(epochs=2, stop=1)
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", refuse)
    with pytest.raises(FailedPrecondition, match=r"can't be gone on from \(The source state dict is empty\)"):
        train(epochs=2)


def test_killed_anywhere_and_gone_on_with_it_ends_at_the_same_loss(folders, tmp_path):
    shutil.copytree(folders / "vit", tmp_path / "vit")
    kills = ("write:3", "replace:4", "replaced:5")
    command = [sys.executable, "-m", "tests.support.dying_finetune", str(tmp_path), *kills]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    whole = runs.pop("whole")
    assert {kill: run["killed"] for kill, run in runs.items()} == dict.fromkeys(kills, signal.SIGKILL)
    for kill, run in runs.items():
        assert [run[key] for key in ("loss", "accuracy", "weights", "told")] == [
            whole[key] for key in ("loss", "accuracy", "weights", "told")
        ], kill
        assert run["begun"].startswith("resumed at step"), kill


def test_another_run_is_not_gone_on_with(train, tmp_path):
    with pytest.raises(Stopped):
        train(epochs=2, stop=1)
    with pytest.raises(FailedPrecondition, match=r"is of another run \(lr was 0.0005, is 0.1\)"):
        train(epochs=2, lr=0.1)
    (tmp_path / "run" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(FailedPrecondition, match=r"state.safetensors can't be gone on from"):
        train(epochs=2)


def test_what_a_model_or_a_device_does_not_have_is_told(train):
    with pytest.raises(InvalidArgument, match="layers must be 1 to 3 for this model, got 4"):
        train(tune="last", layers=4)
    with pytest.raises(InvalidArgument, match=r"precision must be auto, or what cpu computes in: .*float32, got"):
        pick_precision("float16", torch.device("cpu"))
    assert pick_precision("float32", torch.device("cpu")) is torch.float32
