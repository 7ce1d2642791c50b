"""Ctrl-C and SIGTERM give one line that says how to go on, a checkpoint and exit status 75, from
the first moment on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from featcache import cli
from featcache.catalog import ledger
from featcache.errors import StoppedError
from featcache.runtime import signals
from student import checkpoint
from student.training import metrics, preemption
from tests import student_fixtures as fx
from tests.test_end_to_end import assert_undisturbed

OPTIONS = ("--steps", "60", "--batch-size", "8", "--save-every", "50")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stop") / "whole"
    fx.good(fx.train("mralign", run, "--cache", fx.cache_path(), *OPTIONS))
    return run


def words(run: Path, *options: str) -> list[str]:
    settings = [part for text in fx.RECIPES["mralign"] for part in ("--set", text)]
    given = [
        "--recipe",
        "mralign",
        "--cache",
        str(fx.cache_path()),
        "--device",
        "cpu",
        "--out",
        str(run),
    ]
    return ["student", "train", *given, *OPTIONS, *settings, *options]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    env = {**fx.environment(), "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(run: Path) -> int:
    path = run / metrics.NAME
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_it_saves_says_how_to_go_on_and_goes_on_bit_equal(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start([sys.executable, "-m", *words(run)])
    wait_for(lambda: lines(run) >= 5, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out == ""
    said = [
        line
        for line in err.splitlines()
        if line and not line.startswith(("note:", "recipe mralign:"))
    ]
    assert len(said) == 1, err
    found = re.fullmatch(
        rf"stopped after step (\d+) of 60 by {number.name}, its checkpoint is saved; "
        r"the same command with --resume goes on from there",
        said[0],
    )
    assert found, err
    step = int(found[1])
    assert 5 <= step < 50
    assert checkpoint.latest_step(run) == step
    assert checkpoint.load_encoder_file(run / checkpoint.ENCODER)[1]["step"] == step
    assert len(metrics.read(run)) == step
    assert ("note: stopping after this step" in err) == (number == signal.SIGINT)
    facts = fx.good(
        fx.train("mralign", run, "--cache", fx.cache_path(), *OPTIONS, "--resume", "--json")
    ).json
    assert facts["first_step"] == step
    assert_undisturbed(run, whole)


def test_a_requeued_command_needs_no_other_words(tmp_path: Path) -> None:
    """--resume was given already: then the very same command goes on."""
    assert str(preemption.stopped_error(3, 9, "SIGTERM", resume=True)).endswith(
        "; the same command goes on from there"
    )


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    """Only one of the two hears the signal."""
    run = tmp_path / "run"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",  # on a free port
        "-m",
    ]
    whole = [*launcher, *words(tmp_path / "whole"), "--batch-size", "4"]
    assert (
        subprocess.run(whole, env=fx.environment(), capture_output=True, check=False).returncode
        == 0
    )
    command = [*launcher, *words(run), "--batch-size", "4"]
    process = start(command)
    wait_for(lambda: lines(run) >= 5, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout
    os.kill(int(children.split()[-1]), signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    step = checkpoint.latest_step(run)
    assert step is not None, err
    assert 5 <= step < 50
    assert err.count("stopped after step") == 1
    assert f"stopped after step {step} of 60" in err
    ran = subprocess.run(
        [*command, "--resume"], env=fx.environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert_undisturbed(run, tmp_path / "whole")


# ---------------------------------------------------------------- what is noted, and what is not


@pytest.fixture
def acc() -> Accelerator:
    fx.fresh_state()
    return Accelerator(cpu=True)


def test_the_second_ctrl_c_waits_for_nothing(
    acc: Accelerator, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with preemption.StopNotice(acc) as notice:
        assert not notice.due()
        signal.raise_signal(signal.SIGINT)
        assert notice.due()
        assert "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_the_caller_ignores_stays_ignored(acc: Accelerator) -> None:
    """As a shell does for what a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signals.install_handlers()
        with preemption.StopNotice(acc) as notice:
            signal.raise_signal(signal.SIGINT)
            assert not notice.due()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_schedulers_may_send_a_notice_twice(acc: Accelerator, name: str) -> None:
    """Slurm's --signal sends the one that it is told to."""
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with preemption.StopNotice(acc) as notice:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert notice.asked == name
        assert notice.due()
    assert signal.getsignal(number) == before


def test_training_in_another_thread_leaves_signals_alone(acc: Accelerator) -> None:
    seen: list[Any] = []

    def work() -> None:
        with preemption.StopNotice(acc) as notice:
            seen.append((signal.getsignal(signal.SIGTERM), notice.due()))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_several_processes_look_one_step_later(
    acc: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process heard a signal in the second step: all see it after the third."""
    theirs = iter([0.0, 1.0, 0.0])
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(acc, "reduce", lambda mine, how: mine + next(theirs))
    with preemption.StopNotice(acc) as notice:
        assert [notice.due() for _ in range(3)] == [False, False, True]
        assert notice.asked is None


def test_what_is_said_when_nothing_was_waited_for(tmp_path: Path) -> None:
    assert (
        str(preemption.stopped_at_once(tmp_path, False))
        == "stopped before the first step; run the same command again"
    )
    (tmp_path / checkpoint.CONFIG).touch()
    assert "stopped before the first checkpoint; the same command with --resume" in str(
        preemption.stopped_at_once(tmp_path, False)
    )
    checkpoint.save(tmp_path, 12, {"model": {}, "optimizer": {}, "scaler": {}})
    error = preemption.stopped_at_once(tmp_path, False)
    assert (
        str(error)
        == "stopped; the checkpoint of step 12 is kept, the same command with --resume goes on "
        "from there"
    )
    assert (error.exit_status, isinstance(error, StoppedError)) == (75, True)


def test_an_interrupt_before_the_first_step_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("student.training.train._gradients", interrupted)
    ran = fx.train(
        "mralign", tmp_path / "run", "--cache", fx.cache_path(), *OPTIONS, home=tmp_path / "home"
    )
    assert ran.status == 75
    assert ran.line == "stopped before the first step; run the same command again"
    assert not (tmp_path / "run").exists()
    text = (tmp_path / "home/runs.jsonl").read_text()
    use, line = map(json.loads, text.splitlines())
    assert (use["command"], line["command"], line["views_shown"]) == ("use", "train", 0)
    assert line["outcome"] == "stopped"


# ---------------------------------------------------------------- the ledger


@pytest.mark.slow
def test_a_stopped_run_is_among_a_caches_runs_and_a_resume_without_work_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's path is absolute: the next reader may stand elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    options = ("--cache", fx.cache_path(), "--steps", "3", "--batch-size", "8")

    def stops(self: preemption.StopNotice) -> bool:
        self.asked = "SIGTERM"
        return True

    with monkeypatch.context() as patch:
        patch.setattr(preemption.StopNotice, "due", stops)
        assert fx.train("mralign", Path("run"), *options, home=tmp_path / "home").status == 75
    for _ in range(3):
        fx.good(fx.train("mralign", Path("run"), *options, "--resume", home=tmp_path / "home"))
    with fx.open_cache() as cache:
        runs = ledger.runs_of(cache.manifest["id"])
    assert [(run["run"], run["step"], run.get("stopped")) for run in runs] == [
        (str(tmp_path / "run"), 1, True),
        (str(tmp_path / "run"), 3, None),
    ]


# ---------------------------------------------------------- while a program is still being imported


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("slow", ["click", "torch"])
@pytest.mark.parametrize("program", ["student", "featcache"])
def test_stopped_while_it_is_imported(
    program: str, slow: str, number: signal.Signals, tmp_path: Path
) -> None:
    """A module that takes long to import, and makes an ImportError of an interrupt as numpy
    does."""
    (tmp_path / f"{slow}.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'here')!r}).touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise ImportError('half of it')\n"
    )
    path = f"{tmp_path}:{Path(__file__).parents[3]}"
    args = ["train", "--recipe", "mae"] if program == "student" else ["teachers"]
    process = start([sys.executable, "-m", program, *args], PYTHONPATH=path)
    wait_for(lambda: (tmp_path / "here").exists(), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert re.fullmatch(
        r"stopped( before anything was begun)?; run the same command again\n", err
    ), err


def test_an_import_that_fails_by_itself_keeps_its_traceback() -> None:
    with pytest.raises(ImportError, match="broken"), signals.guard_imports(1):
        raise ImportError("broken")


@pytest.mark.parametrize("command", ["extract", "convert", "verify", "rm", "info"])
def test_each_command_says_what_goes_on(
    command: str, featcache_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    module = importlib.import_module(f"featcache.commands.{command}")
    monkeypatch.setattr(module.command, "callback", interrupted)
    given = {"extract": (), "convert": ("a", "b", "--store", "zarr")}.get(command, ("a",))
    ran = featcache_command(command, *given)
    continues = command in ("extract", "convert")
    assert ran.status == 75
    assert ("the same command continues" in ran.err) == continues
    assert ("run the same command again" in ran.err) == (command in ("verify", "info"))
    assert set(cli.STOPPED) <= set(cli.cli.list_commands(None))  # type: ignore[arg-type]
