"""Every benchmark that is run by its name has help, and refuses a place that it cannot write to
before it measures anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click
import pytest

import benchmarks
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import Option

FOLDER = Path(benchmarks.__file__).parent
PROGRAMS = [f"benchmarks.{path.stem}" for path in sorted(FOLDER.glob("bench_*.py"))]


def _command(name: str) -> Command:
    command = importlib.import_module(name).cli
    assert isinstance(command, Command)
    return command


def _run(
    command: click.Command,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    status: object = 0
    try:
        entry(command)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_each_has_help_and_refuses_a_wrong_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    wrong = {
        "--json": [str(tmp_path / "no/file.json"), str(tmp_path), "s3://a/b"],
        "--folder": [str(tmp_path / "file"), str(tmp_path / "file/below")],
        "--node": [str(tmp_path / "no")],
        "--out": [str(tmp_path / "file/below")],
    }
    assert len(PROGRAMS) > 10
    for name in (*PROGRAMS, "benchmarks.gpu.__main__"):
        command = _command(name)
        options = [param for param in command.params if isinstance(param, click.Option)]
        assert [each.opts for each in options if not (isinstance(each, Option) and each.help)] == []
        status, out, err = _run(command, ["--help"], monkeypatch, capsys)
        assert (status, err) == (0, ""), name
        assert out.startswith("Usage: "), name
        status, out, err = _run(command, ["--jsno", "x"], monkeypatch, capsys)
        assert (status, out) == (2, ""), name
        assert err.startswith("error: unknown option '--jsno'"), name
        arguments = ["HEAD" for each in command.params if isinstance(each, click.Argument)]
        for option in {each.opts[0] for each in options} & wrong.keys():
            for value in wrong[option]:
                words = [*arguments, option, value]
                status, out, err = _run(command, words, monkeypatch, capsys)
                assert (status, out, err.count("\n")) == (2, "", 1), (name, option, value, err)
                assert err.startswith("error: "), (name, err)
                assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
