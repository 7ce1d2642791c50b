"""The command itself: its help, what it lists, what it refuses; slow: a reduced table for real."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from featcache.errors import UsageError
from pipelines import clipart
from pipelines.ablate import __main__ as ablate
from pipelines.ablate import models
from pipelines.ablate.table import Table


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["ablate", *map(str, words)])
    ablate.main()


def test_every_table_has_help_and_is_found() -> None:
    context = click.Context(ablate.cli)
    assert ablate.cli.list_commands(context) == ["models", "finetune"]
    for name in ablate.TABLES:
        command = ablate.cli.get_command(context, name)
        assert command is not None
        assert command.help
        assert f"python -m pipelines.ablate {name}" in (command.epilog or "")
    assert ablate.cli.get_command(context, "nothing") is None


def test_a_dry_run_lists_the_jobs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "models", "--out", tmp_path / "out", "--seeds", "0,7", "--dry-run")
    said = capsys.readouterr().out.splitlines()
    per_seed = 8 + len(models.TABLE.rows) * len(models.TABLE.columns)  # 2 and 6 students
    assert len(said) == 2 * per_seed + 1
    first = f"to do\tpython -m pipelines.digits {tmp_path}/out/seed-0/data --seed 0 --epochs 20"
    assert said[0] == first
    assert said[-1] == f"0 of {2 * per_seed} done, ETA unknown"
    assert not (tmp_path / "out").exists()


def test_clip_art_is_read_where_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("models", "--scale", "clipart", "--out", tmp_path, "--dry-run", "--clipart", "art")
    call(monkeypatch, *words)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("seed-0/data --seed 0 --epochs 60 --clipart art")
    with pytest.raises(UsageError, match="--clipart is read at --scale clipart alone"):
        ablate._scale("digits", False, Path("art"))
    assert ablate._scale("digits", True, clipart.ROOT).epochs == 1


@pytest.mark.slow
def test_a_reduced_table_runs_and_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rows of the table, by three protocols, on digits that were hardly learnt."""
    names = ("teacher", "untrained", "milan")
    rows = tuple(row for row in models.TABLE.rows if row.name in names)
    orders = tuple(
        each for each in models.TABLE.orderings if {each.higher, each.lower} <= set(names)
    )
    protocols = ("knn-cls", "linear-cls", "attentive")
    columns = tuple(each for each in models.TABLE.columns if each.name in protocols)
    cut = Table(models.TABLE.title, rows, columns, orders)
    monkeypatch.setattr(models, "TABLE", cut)
    monkeypatch.setenv("FEATCACHE_HOME", "")  # it is set by the run, and undone after the test
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    words = ("models", "--out", tmp_path / "out", "--seeds", "0", "--reduced")
    call(monkeypatch, *words)
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "out/results.json").read_text())
    scores = facts["scores"]["0"]
    assert set(scores) == set(names)
    assert all(set(found) == {column.name for column in columns} for found in scores.values())
    assert all(0 < score < 100 for found in scores.values() for score in found.values())
    assert "- milan above untrained by k-NN [CLS]: " in said
    assert (tmp_path / "out/results.md").read_text() in said
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out/jobs").rglob("*"))
    call(monkeypatch, *words)
    again = capsys.readouterr().out
    assert "$ python" not in again
    after = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out/jobs").rglob("*"))
    assert before == after
