"""Single rows are found in metrics.jsonl without reading all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from featcache.errors import UserError
from student.reporting import metric_rows


def write(run: Path, steps: list[int], after: str = "") -> Path:
    """Rows of very different lengths, whose loss is their step."""
    rows = (json.dumps({"step": s, "loss": float(s), "x": "y" * (s * 37 % 400)}) for s in steps)
    (run / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows) + after)
    return run


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 257, 1000])
@pytest.mark.parametrize("after", ["", '{"step": 99'])
def test_every_row_is_found(tmp_path: Path, count: int, after: str) -> None:
    steps = list(range(1, count + 1))
    run = write(tmp_path, steps, after)
    rows = metric_rows.rows_at(run, [*steps, 0, count + 1])
    assert [row and row["loss"] for row in rows] == [*map(float, steps), None, None]
    last = metric_rows.last_row(run)
    assert last is not None
    assert last["step"] == count


def test_steps_that_were_left_out_are_none(tmp_path: Path) -> None:
    run = write(tmp_path, [2, 5, 9])
    rows = metric_rows.rows_at(run, range(1, 11))
    assert [row and row["step"] for row in rows] == [
        None, 2, None, None, 5, None, None, None, 9, None,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", '{"step": 1, "loss": 2.0}'])
def test_no_whole_row_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    assert metric_rows.last_row(tmp_path) is None
    assert metric_rows.rows_at(tmp_path, [1]) == [None]


@pytest.mark.parametrize(
    "text", ["\n", "{}\n", "[" * 900 + "\n", '{"step": true}\n', "x" * (3 << 20), "x\n" * 9]
)
def test_what_is_no_row_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="metrics"):
        metric_rows.last_row(tmp_path)


def test_a_row_longer_than_what_is_looked_at_first(tmp_path: Path) -> None:
    wide = {"step": 2, "loss": 0.5, "x": "y" * 200_000}
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{json.dumps(wide)}\n')
    assert metric_rows.last_row(tmp_path) == wide
    assert metric_rows.rows_at(tmp_path, [1, 2]) == [{"step": 1}, wide]


def test_a_link_and_a_pipe_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="link"):
        metric_rows.last_row(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="regular file"):
        metric_rows.last_row(tmp_path)


def test_few_of_a_million_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisection halves 20 times; its ends are bytes, so that some rows are looked at twice."""
    parsed: list[bytes] = []
    plain = metric_rows.parse_row
    monkeypatch.setattr(
        metric_rows, "parse_row", lambda line, *more: parsed.append(line) or plain(line, *more)
    )
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {s}, "loss": 1.5}}\n' for s in range(1, 10**6 + 1))
    rows = metric_rows.rows_at(tmp_path, [1, 250_000, 999_999, 10**6])
    last = metric_rows.last_row(tmp_path)
    assert 5 <= len(parsed) <= 4 * 30 + 1
    assert [row and row["step"] for row in rows] == [1, 250_000, 999_999, 10**6]
    assert last == {"step": 10**6, "loss": 1.5}
