"""`student runs`: what it says of whole, unfinished, unbegun and damaged runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from student.reporting import metric_rows, run_facts
from tests import finetuning as ft
from tests import student_fixtures as fx


def write(
    run: Path,
    made: int,
    steps: int = 10,
    saved: int | None = None,
    results: tuple[dict[str, Any], ...] = (),
    **record: Any,
) -> Path:
    """A run folder by hand: rows of `made` steps, whose loss is 100 / step, written an hour ago."""
    run.mkdir(parents=True)
    about = {"recipe": "mae", "config": {}, "steps": steps, **record}
    (run / "config.json").write_text(json.dumps(about))
    rows = ({"step": s, "loss": 100 / s, "lr": 0.001 * s} for s in range(1, made + 1))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if saved is not None:
        (run / "checkpoints").mkdir()
        (run / f"checkpoints/step-{saved:08d}.pt").write_bytes(b"x" * 1000)
    if results:
        (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    old = time.time() - 3600
    os.utime(run / "metrics.jsonl", (old, old))
    return run


def result(protocol: str, score: float, test: str = "val", **settings: Any) -> dict[str, Any]:
    return {
        "time": "2026-01-02T03:04:05Z", "run": "r", "protocol": protocol, "test": test,
        "score": score, "interval": [score - 1, score + 1], "n_test": 50, "settings": settings,
    }  # fmt: skip


def listed(folder: Path, *options: str) -> list[dict[str, Any]]:
    return json.loads(fx.good(fx.stud("runs", folder, "--json", *options)).out)


def names(folder: Path, *options: str) -> list[str]:
    return [Path(facts["path"]).name for facts in listed(folder, *options)]


def test_a_trained_run(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--steps", "3", "--batch-size", "8")
    fx.good(fx.train("mae", tmp_path / "runs/mae", *options))
    (facts,) = listed(tmp_path)
    lines = (tmp_path / "runs/mae/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert (facts["recipe"], facts["state"], facts["step"]) == ("mae", "done", 3)
    assert (facts["loss"], facts["lr"]) == (rows[-1]["loss"], rows[-1]["lr"])
    files = [path for path in (tmp_path / "runs/mae").rglob("*") if path.is_file()]
    assert facts["bytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.slow
def test_a_fine_tuned_run_says_what_it_began_from(tmp_path: Path) -> None:
    fx.good(ft.finetune("mae", tmp_path / "tuned"))
    (facts,) = listed(tmp_path)
    assert (facts["recipe"], facts["begun"], facts["state"]) == ("finetune", "mae", "done")
    assert "finetune of mae" in fx.stud("runs", tmp_path).out


@pytest.mark.parametrize(
    ("made", "saved", "idle_s", "state"),
    [
        (0, None, 3600, "unbegun"),
        (0, 0, 3600, "stopped"),
        (4, None, 3600, "stopped"),
        (4, 3, 599, "running?"),
        (4, 3, 601, "stopped"),
        (10, 10, 5, "done"),
        (10, None, 3600, "done, no checkpoint"),
    ],
)
def test_the_state_of_a_run(
    tmp_path: Path, made: int, saved: int | None, idle_s: float, state: str
) -> None:
    run = write(tmp_path / "run", made, saved=saved)
    now = (run / "metrics.jsonl").stat().st_mtime + idle_s
    facts = run_facts.describe(run, now)
    assert (facts["state"], facts["step"], facts["steps"]) == (state, made, 10)


def test_the_table(tmp_path: Path) -> None:
    write(tmp_path / "a", 4, saved=2, results=(result("knn", 40.0), result("knn", 41.25)))
    out = fx.good(fx.stud("runs", tmp_path)).out
    head, line = out.splitlines()
    assert head.split()[:4] == ["run", "recipe", "state", "step"]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert line.split() == [
        str(tmp_path / "a"), "mae", "stopped", "4/10", "25.0000", "4.00e-03", "knn/val", "41.25",
        f"{size / 1000:.1f}", "kB", "1", "h", "ago",
    ]  # fmt: skip


def test_best_first_by_a_score(tmp_path: Path) -> None:
    """The newest result of a run counts, and a run without one comes last."""
    write(tmp_path / "a", 1, results=(result("knn", 90.0), result("knn", 30.0)))
    write(tmp_path / "b", 1, results=(result("knn", 40.0), result("linear", 10.0)))
    write(tmp_path / "c", 1)
    write(tmp_path / "d", 1, results=(result("knn", 35.0),))
    assert names(tmp_path) == ["a", "b", "c", "d"]
    assert names(tmp_path, "--sort", "knn") == ["b", "d", "a", "c"]
    assert names(tmp_path, "--sort", "knn/val") == ["b", "d", "a", "c"]
    assert names(tmp_path, "--sort", "linear") == ["b", "a", "c", "d"]
    ran = fx.good(fx.stud("runs", tmp_path, "--sort", "knn"))
    assert "linear" not in ran.out
    assert ran.err == ""


def test_scores_of_several_settings_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "a", 1, results=(result("knn", 90.0, k=10),))
    write(tmp_path / "b", 1, results=(result("knn", 95.0, k=20),))
    ran = fx.good(fx.stud("runs", tmp_path, "--sort", "knn"))
    assert ran.err == (
        "note: knn/val was measured with several settings; `student compare` says which\n"
    )


@pytest.mark.parametrize(
    ("sort", "told"),
    [
        ("knn", "--sort knn: there are several test sets; give one of knn/a, knn/b"),
        ("linaer", "no run has a score 'linaer': known: knn/a, knn/b"),
    ],
)
def test_a_score_that_is_not_meant_is_one_line(tmp_path: Path, sort: str, told: str) -> None:
    write(tmp_path / "a", 1, results=(result("knn", 90.0, "a"), result("knn", 30.0, "b")))
    ran = fx.stud("runs", tmp_path, "--sort", sort)
    assert ran.status == 2
    assert told in ran.line


def test_a_folder_without_runs_or_scores(tmp_path: Path) -> None:
    assert "no runs below" in fx.good(fx.stud("runs", tmp_path)).out
    assert listed(tmp_path) == []
    assert "no folder at" in fx.stud("runs", tmp_path / "none").line
    write(tmp_path / "a", 1)
    assert "no run here has a score" in fx.stud("runs", tmp_path, "--sort", "knn").line


def test_runs_are_found_in_folders_below_and_nothing_else_is(tmp_path: Path) -> None:
    write(tmp_path / "one/two/a", 1)
    write(tmp_path / "b", 1)
    write(tmp_path / "b/inside", 1)  # of a run's own folder
    write(tmp_path / ".hidden/c", 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/manifest.json").write_text("{}")
    write(tmp_path / "cache/d", 1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "vit"}')
    write(tmp_path.parent / f"{tmp_path.name}-elsewhere", 1)
    (tmp_path / "link").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert names(tmp_path) == ["b", "a"]
    assert names(tmp_path / "b") == ["b"]


DAMAGE: dict[str, tuple[str, Any]] = {
    "no config": ("config.json", None),
    "no JSON": ("config.json", "{"),
    "no object": ("config.json", "[1]"),
    "no recipe": ("config.json", '{"config": {}}'),
    "no steps": ("config.json", '{"recipe": "mae", "config": {}}'),
    "odd steps": ("config.json", '{"recipe": "mae", "config": {}, "steps": "\\u001b[2J"}'),
    "huge steps": ("config.json", '{"recipe": "mae", "config": {}, "steps": 1e400}'),
    "no metrics": ("metrics.jsonl", None),
    "no row": ("metrics.jsonl", "\x1b[31mred\n"),
    "no text": ("metrics.jsonl", b"\xff\xfe\n"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_one_line_beside_the_others(tmp_path: Path, kind: str) -> None:
    name, content = DAMAGE[kind]
    write(tmp_path / "a", 3, saved=2)
    write(tmp_path / "b", 3, saved=2)
    (tmp_path / "a" / name).unlink()
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "a" / name).write_bytes(data)
    ran = fx.good(fx.stud("runs", tmp_path))
    assert all(char.isprintable() or char == "\n" for char in ran.out + ran.err)
    _, good, bad = ran.out.splitlines()
    assert good.startswith(str(tmp_path / "b"))
    assert bad.startswith(f"{tmp_path / 'a'}: damaged: ")
    first, second = listed(tmp_path)
    assert (first["step"], set(second)) == (3, {"path", "damaged"})


def test_odd_values_are_told_or_left_out(tmp_path: Path) -> None:
    """A loss that is no number, a file of the far future, names that hold control characters."""
    run = write(tmp_path / "odd\x1b[31m", 1, recipe="\x9bmine\n" * 90)
    for loss, told in (("nan", "nan"), ("\x1b[2J", None), (10**39, 1e39)):
        (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": loss}) + "\n")
        os.utime(run / "metrics.jsonl", (10**11, 10**12))
        (facts,) = listed(tmp_path)
        assert facts["loss"] == told
        out = fx.good(fx.stud("runs", tmp_path)).out
        assert all(char.isprintable() or char == "\n" for char in out)
        assert len(out.splitlines()) == 2
        assert out.endswith("0 s ago\n")  # file systems end at different years


@pytest.mark.slow
def test_of_each_run_one_row_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    plain = metric_rows.parse_row
    monkeypatch.setattr(
        metric_rows, "parse_row", lambda line, *more: parsed.append(line) or plain(line, *more)
    )
    write(tmp_path / "0", 100_000, steps=200_000, saved=9, results=(result("knn", 1.0),))
    for i in range(1, 300):
        run = tmp_path / str(i)
        run.mkdir()
        for name in ("config.json", "metrics.jsonl", "results.jsonl"):
            os.link(tmp_path / "0" / name, run / name)
    found = [run_facts.describe(run) for run in run_facts.find(tmp_path)]
    assert len(parsed) == 300
    assert [facts["step"] for facts in found] == [100_000] * 300
