"""Trackers get what metrics.jsonl gets; a missing package is one line; a resumed run is one
curve."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import tracking

from student.setup import picture_check
from student.training import metrics, trackers
from tests import student_fixtures as fx

OPTIONS = ("--batch-size", "8", "--save-every", "2")

# Stands for the package: notes what it is told, one JSON object a line.
WANDB = """
import json, pathlib
PLACE = pathlib.Path({place!r})
def note(what, values):
    with PLACE.open("a") as file:
        file.write(json.dumps([what, values]) + "\\n")
class Run:
    def log(self, values, step=None, **rest):
        note("log", {{"step": step, **values}})
    def finish(self):
        note("finish", None)
class Config:
    def update(self, values, **rest):
        note("config", values)
config = Config()
def init(project, **given):
    note("init", {{"project": project, **given}})
    return Run()
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """A stand-in for wandb is installed; what it was told."""
    place, packages = tmp_path / "told", tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text(WANDB.format(place=str(place)))
    monkeypatch.syspath_prepend(str(packages))
    # looked for when it is imported
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return lambda: [json.loads(line) for line in place.read_text().splitlines()]


@pytest.mark.slow
def test_weights_and_biases_gets_every_row_once(
    told: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ("--cache", fx.cache_path(), *OPTIONS, "--tracker", "wandb", "--tracker", "json")
    fx.good(fx.train("maskalign", run, *options, "--steps", "4"))
    (_, init), (_, config), *rows, last = told()
    assert last == ["finish", None]
    assert init["project"] == "student"
    assert (init["name"], init["resume"], init["dir"]) == ("run", "allow", str(run / "tracking"))
    assert config["config.drop_path"] == 0.1
    assert config["seed"] == 0
    kept = [
        {key: value for key, value in row.items() if key != "time"} for row in metrics.read(run)
    ]
    assert [values for what, values in rows] == kept  # a tracker has times of its own
    assert len(metrics.read(run)) == 4
    # goes on under the same id, with the steps that are missing
    (run / "checkpoints/step-00000004.pt").unlink()
    fx.good(fx.train("maskalign", run, *options, "--steps", "4", "--resume"))
    (_, again), _, *rows, last = told()[7:]
    assert again["id"] == init["id"]
    assert [values["step"] for _, values in rows] == [3, 4]
    # another run has another id
    fx.good(fx.train("maskalign", tmp_path / "other", *options, "--steps", "1"))
    assert told()[12][1]["id"] != init["id"]


def test_a_run_that_fails_closes_its_tracker(
    told: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # which would find it before the run begins
    monkeypatch.setattr(picture_check, "check_pictures", lambda *args: None)
    others = fx.save_pictures(tmp_path / "others", seed=1)
    options = (
        "--cache",
        fx.cache_path(),
        *OPTIONS,
        "--tracker",
        "wandb",
        "--check-pixels",
        "1",
        "--images",
        others,
    )
    assert fx.train("maskalign", tmp_path / "run", *options, "--steps", "4").status == 1
    assert told()[-1] == ["finish", None]
    assert not (tmp_path / "run").exists()  # nothing was trained: the folder is free again


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    ran = fx.train(
        "maskalign", tmp_path / "run", "--cache", fx.cache_path(), *OPTIONS, "--tracker", name
    )
    assert ran.status == 2
    assert f"pip install {name}" in ran.line
    assert f"featcache[{name}]" in ran.line
    assert not (tmp_path / "run").exists()
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'\n{name} = ["{name}' in pyproject  # the extra that the line names


def test_a_tracker_that_cannot_begin_is_one_line(
    told: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nobody is logged in; the folder is free again."""
    import wandb

    def init(project: str, **given: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\n Run wandb login")

    monkeypatch.setattr(wandb, "init", init)
    options = ("--cache", fx.cache_path(), *OPTIONS, "--tracker", "wandb", "--steps", "1")
    ran = fx.train("maskalign", tmp_path / "run", *options)
    assert ran.status == 1
    assert "--tracker wandb cannot begin: RuntimeError: api_key not configured" in ran.line
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker(tmp_path: Path) -> None:
    ran = fx.train(
        "maskalign", tmp_path / "run", "--cache", fx.cache_path(), *OPTIONS, "--tracker", "mlflow"
    )
    assert ran.status == 2
    assert all(name in ran.line for name in trackers.NAMES)


def test_tensorboard_is_given_every_row_and_where_to_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Accelerate's own tracker, with a writer in place of the package's."""
    made: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder, self.purge_step, self.rows, self.closed = (
                folder,
                purge_step,
                dict[str, list[Any]](),
                False,
            )
            made.append(self)

        def add_hparams(self, values: dict[str, Any], metric_dict: dict[str, Any]) -> None:
            assert all(isinstance(value, bool | int | float | str) for value in values.values())

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            self.rows.setdefault(name, []).append((global_step, value))

        def flush(self) -> None: ...

        def close(self) -> None:
            self.closed = True

    fake = ModuleType("tensorboardX")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    # the other one that it would take
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    run = tmp_path / "run"
    options = ("--cache", fx.cache_path(), *OPTIONS, "--steps", "4", "--tracker", "tensorboard")
    fx.good(fx.train("maskalign", run, *options))
    (run / "checkpoints/step-00000004.pt").unlink()
    fx.good(fx.train("maskalign", run, *options, "--resume"))
    first, second = made
    assert (first.folder, first.purge_step, second.purge_step) == (
        str(run / "tracking/student"),
        1,
        3,
    )
    rows = metrics.read(run)
    assert first.rows["loss"] == [(row["step"], row["loss"]) for row in rows]
    assert second.rows["lr"] == [(row["step"], row["lr"]) for row in rows[2:]]
    assert first.closed
    assert second.closed


@pytest.mark.slow
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """With the package itself, where it is installed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = ("--cache", fx.cache_path(), *OPTIONS, "--steps", "4", "--tracker", "tensorboard")
    fx.good(fx.train("maskalign", run, *options))
    (run / "checkpoints/step-00000004.pt").unlink()
    fx.good(fx.train("maskalign", run, *options, "--resume"))
    events = EventAccumulator(str(run / "tracking/student")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert scalars == {row["step"]: pytest.approx(row["loss"]) for row in metrics.read(run)}


def test_a_run_without_a_step_takes_away_what_its_trackers_wrote_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    top = tmp_path / "run" / trackers.FOLDER
    for name in (
        "id", "student/events.out.tfevents.1.host", "student/1.5/hparams.yml", "wandb/run-1/a.log",
        "thesis.tex", "student/notes/thesis.tex",
    ):  # fmt: skip
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text("")
    (elsewhere / "events.out.tfevents.1").write_text("")
    (top / "student/link").symlink_to(elsewhere)
    trackers.forget(tmp_path / "run")
    left = {path.relative_to(top).as_posix() for path in top.rglob("*")}
    assert left == {
        "thesis.tex", "student", "student/link", "student/notes", "student/notes/thesis.tex"
    }  # fmt: skip
    assert (elsewhere / "events.out.tfevents.1").is_file()
