"""An account is one line, however the work ends, of what was counted meanwhile."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from featcache.catalog import costs, ledger
from featcache.catalog.account import Begun, account
from featcache.errors import StoppedError, UsageError, UserError
from featcache.runtime.meter import Counts, Meter, meter


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("FEATCACHE_HOME", str(path))
    return path


def last(place: Path) -> dict[str, Any]:
    return json.loads((place / "runs.jsonl").read_text().splitlines()[-1])


def test_an_account_holds_what_was_counted_inside_it_alone(place: Path) -> None:
    meter.count("bytes_read", 1000)
    with account("copy", rows=3) as line:
        meter.count("bytes_read", 7)
        meter.device(0.25)
        meter.teacher("clip", 0.5, 4)
        meter.add(Counts(device_s=1.0, bytes_read=100, teachers={"clip": (1.5, 6)}))
        line["more"] = "x"
    meter.count("bytes_read", 1000)
    found = last(place)
    assert (found["command"], found["outcome"], found["rows"], found["more"]) == (
        "copy", "done", 3, "x",
    )  # fmt: skip
    assert (found["bytes_read"], found["device_s"], found["teacher_s"]) == (107, 1.25, 2.0)
    assert found["teacher_cost"] == {"clip": [2.0, 10]}
    assert found["pid"] > 0
    assert found["user"]
    assert found["host"]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UserError("x"), "failed"),
        (RuntimeError("x"), "failed"),
        (StoppedError("x"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (SystemExit(3), "failed"),
    ],
)
def test_work_that_ends_early_leaves_its_line(
    place: Path, error: BaseException, outcome: str
) -> None:
    def work() -> None:
        with account("extract"):
            meter.count("bytes_written", 5)
            raise error

    with pytest.raises(type(error)):
        work()
    assert (last(place)["outcome"], last(place)["bytes_written"]) == (outcome, 5)


def test_a_signal_told_as_a_users_error_is_a_stop(place: Path) -> None:
    def stops() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise UserError("stopped: the same command continues") from None

    with pytest.raises(UserError), account("extract"):
        stops()
    assert last(place)["outcome"] == "stopped"


def test_a_wrong_command_leaves_no_line(place: Path) -> None:
    with pytest.raises(UsageError), account("copy"):
        raise UsageError("give another folder")
    assert not (place / "runs.jsonl").exists()


def test_a_clock_that_is_set_back_changes_no_duration(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Begun()
    monkeypatch.setattr(time, "time", lambda: begun.at - 3600)
    with account("copy", begun=begun):
        pass
    found = last(place)
    assert found["end"] < found["start"]
    assert 0 <= found["wall_s"] < 3600
    assert costs.read().passed_over == 0


def test_the_processes_of_a_run_are_one_line(place: Path) -> None:
    def gather(own: Counts, error: BaseException | None) -> tuple[Counts, int]:
        assert error is None
        return own + Counts(bytes_read=10), 2

    for speaks in (True, False):
        with account("train", gather=gather, speaks=speaks, processes=2):
            meter.count("bytes_read", 1)
    (line,) = (place / "runs.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["bytes_read"], found["processes"], found["counted"]) == (11, 2, 2)


def test_a_gpus_seconds_are_read_late() -> None:
    """None is asked for before 64 newer ones came, or the sum is wanted."""
    asked = list[int]()

    class Late:
        def __init__(self, number: int) -> None:
            self.number = number

        def item(self) -> float:
            asked.append(self.number)
            return 0.5

    own = Meter()
    for i in range(70):
        own.device(Late(i))
    assert asked == list(range(6))
    assert own.read().device_s == 35.0
    assert asked == list(range(70))


def test_every_line_that_is_written_can_be_read(place: Path) -> None:
    with account("eval finetune", cache_id=None, run="r" * 10**5, big=[0] * 10**5):
        meter.count("bytes_read", sys.maxsize >> 12)
    assert costs.read().passed_over == 0
    assert costs.read().total.sums["bytes_read"] == sys.maxsize >> 12
    assert len(list(ledger.read(place / "runs.jsonl"))) == 1
