"""The knee found on a device whose forwards take a declared time, and what becomes of it on file."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from imagemesh_services.diffusion.backend import Residuals, Run
from imagemesh_services.diffusion.backends.fake import FakeDiffusionModel
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.knees import Knee, knees_path, read_knees, rows_on_file, write_knees
from imagemesh_services.diffusion.tuning import HostMemory, Measured, measure


class Device(FakeDiffusionModel):
    """Its forwards take ``seconds(rows)`` on its own clock, and it has room for so many rows."""

    def __init__(self, seconds: Callable[[int], float], room: int = 1 << 20) -> None:
        self.now, self.seconds, self.room = 0.0, seconds, room
        self.forwards: list[int] = []

    def clock(self) -> float:
        return self.now

    def advance(self, runs: Sequence[Run], residuals: Sequence[Residuals | None]) -> Sequence[Exception | None]:
        if len(runs) > self.room:
            return [MemoryError("out of memory")] * len(runs)
        self.forwards.append(len(runs))
        self.now += self.seconds(len(runs))
        return super().advance(runs, residuals)


class Free:
    """Host memory: every forward so far of ``rows`` rows at most took ``each`` bytes a row."""

    def __init__(self, device: Device, each: int, left: int) -> None:
        self.device, self.each, self.free = device, each, left

    def peak(self) -> int:
        return self.each * max(self.device.forwards, default=0)

    def left(self) -> int:
        return self.free


def found(device: Device, max_rows: int = 64, memory: Free | None = None) -> Measured:
    return measure(device, 64, 64, max_rows=max_rows, rounds=3, clock=device.clock, memory=memory)


def test_the_knee_of_a_declared_device_is_the_formulas() -> None:
    measured = found(Device(lambda rows: 0.01 * rows + 0.004))
    assert (measured.seconds_a_row, measured.seconds_a_forward) == pytest.approx((0.01, 0.004))
    assert (measured.rows, measured.limited_by) == (14, "knee")


def test_forwards_are_timed_in_turns_and_no_further_than_they_pay() -> None:
    device = Device(lambda rows: 0.01 * rows + 0.004)
    measured = found(device)
    assert list(measured.seconds) == [1, 2, 4, 8, 16, 32]
    climb, rounds = device.forwards[:18], device.forwards[18:]
    assert climb == [count for count in (1, 2, 4, 8, 16, 32) for _ in range(3)]
    assert rounds == [1, 2, 4, 8, 16, 32, 32, 16, 8, 4, 2, 1, 1, 2, 4, 8, 16, 32]


def test_a_device_that_gains_to_the_bound_gets_the_bound() -> None:
    measured = found(Device(lambda rows: 0.001 * rows + 0.1), max_rows=24)
    assert list(measured.seconds) == [1, 2, 4, 8, 16, 24]
    assert (measured.rows, measured.limited_by) == (24, "bound")


def test_batching_that_gains_nothing_is_left_alone() -> None:
    assert found(Device(lambda rows: 0.01 * rows)).rows == 1


def test_a_device_that_slows_down_beyond_a_size_is_kept_to_it() -> None:
    measured = found(Device(lambda rows: (0.01 * rows + 0.1) * (1 if rows <= 8 else 3)))
    assert (measured.rows, measured.limited_by) == (8, "knee")


def test_what_does_not_fit_the_devices_memory_is_not_asked_of_it() -> None:
    measured = found(Device(lambda rows: 0.001 * rows + 0.1, room=10))
    assert (measured.rows, measured.limited_by) == (8, "memory")


def test_what_would_not_fit_the_hosts_memory_is_not_tried() -> None:
    device = Device(lambda rows: 0.001 * rows + 0.1)
    measured = found(device, memory=Free(device, each=100, left=900))
    assert (measured.rows, measured.limited_by) == (16, "memory")
    assert max(device.forwards) == 16


def test_a_model_that_cannot_run_says_why() -> None:
    with pytest.raises(MemoryError, match="out of memory"):
        found(Device(lambda rows: 0.1, room=0))


def test_the_hosts_memory_is_told() -> None:
    assert HostMemory().peak() > 1 << 20
    assert HostMemory().left() > 0


KNEE = Knee("f" * 64, "cpu", "float32", 512, 512, 4, 0.06, 0.01)


def test_knees_come_back_for_their_own_fingerprint_device_dtype_and_size_alone(tmp_path: Path) -> None:
    config = DiffusionConfig(knees_file=str(tmp_path / "deep" / "knees.json"))
    path = knees_path(config)
    write_knees(path, [KNEE])
    assert read_knees(path) == [KNEE]
    assert rows_on_file(config, "cpu", "float32") == {("f" * 64, 512, 512): 4}
    assert rows_on_file(config, "cuda", "float32") == rows_on_file(config, "cpu", "float16") == {}


def test_a_new_measurement_takes_the_old_ones_place_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "knees.json"
    other = Knee("f" * 64, "cpu", "float32", 256, 256, 16, 0.01, 0.01)
    newer = Knee("f" * 64, "cpu", "float32", 512, 512, 7, 0.05, 0.01, "memory")
    write_knees(path, [KNEE, other])
    write_knees(path, [newer])
    assert read_knees(path) == [other, newer]
    assert os.listdir(tmp_path) == ["knees.json"]


ENTRY = {"fingerprint": "f", "device": "cpu", "dtype": "float32", "width": 8, "height": 8, "rows": 4,
         "seconds_a_row": 0.1, "seconds_a_forward": 0, "limited_by": "knee"}  # fmt: skip
BAD = {
    "no JSON": "{",
    "another version": json.dumps({"version": 2, "knees": []}),
    "a list": "[]",
    "no rows": json.dumps({"version": 1, "knees": [{**ENTRY, "rows": 0}]}),
    "too many rows": json.dumps({"version": 1, "knees": [{**ENTRY, "rows": 1e9}]}),
    "a word": json.dumps({"version": 1, "knees": [{**ENTRY, "rows": "four"}]}),
    "a field too many": json.dumps({"version": 1, "knees": [{**ENTRY, "x": 1}]}),
    "a field too few": json.dumps({"version": 1, "knees": [{"rows": 4}]}),
    "nesting": "[" * 100_000,
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_right_is_not_believed(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "knees.json"
    path.write_text(content)
    assert read_knees(path) == []
    assert "no knees are taken from" in caplog.text


def test_without_a_setting_the_file_is_the_users() -> None:
    config = DiffusionConfig()
    assert knees_path(config, {"XDG_STATE_HOME": "/s"}) == Path("/s/imagemesh/knees.json")
    assert knees_path(config, {}).parts[-4:] == (".local", "state", "imagemesh", "knees.json")
