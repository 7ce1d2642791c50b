"""A command of a warm process is `python -m` in what it is told, says and returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import warm_commands


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that says what it is given, and ends with the status that it is told."""
    (tmp_path / "told.py").write_text(
        "import os, sys, time\n"
        "print(__name__, sys.argv[1:], flush=True)\n"
        "print(os.getpid(), 'torch' in sys.modules, flush=True)\n"
        "time.sleep(float(sys.argv[2]))\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    monkeypatch.chdir(tmp_path)
    return "told"


def plain(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "told", *arguments]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.mark.parametrize("status", ["0", "1", "75"])
def test_it_says_and_returns_what_a_cold_one_does(module: str, status: str) -> None:
    shown: list[str] = []
    said, found = warm_commands.run(module, [status, "0"], shown.append)
    cold = plain([status, "0"])
    assert (found, said.splitlines()[0]) == (cold.returncode, cold.stdout.splitlines()[0])
    assert "".join(shown) == said
    process, has_torch = said.splitlines()[1].split()
    assert int(process) != os.getpid()
    assert has_torch == "True"


def test_one_is_another_process_than_the_next(module: str) -> None:
    ran = [warm_commands.run(module, ["0", "0"], lambda line: None)[0] for _ in range(2)]
    assert ran[0].splitlines()[1] != ran[1].splitlines()[1]


def test_who_waits_is_told_so(module: str) -> None:
    told: list[float] = []
    warm_commands.run(module, ["0", "0.5"], lambda line: None, told.append, every_s=0.1)
    assert told == sorted(told) != []


def test_a_stop_ends_the_command(module: str) -> None:
    """Ctrl-C while its lines are read leaves no process behind."""
    found: list[int] = []

    def stop(line: str) -> None:
        if line[0].isdigit():
            found.append(int(line.split()[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_commands.run(module, ["0", "600"], stop)
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


def test_a_killed_command_has_a_status(module: str) -> None:
    def kill(line: str) -> None:
        if line[0].isdigit():
            os.kill(int(line.split()[0]), signal.SIGKILL)

    _, status = warm_commands.run(module, ["0", "600"], kill)
    assert status == -signal.SIGKILL
