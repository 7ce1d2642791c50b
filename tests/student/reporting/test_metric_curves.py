"""Curves are thinned without a spike being lost: against numpy over all rows, in pieces and whole,
with broken lines, rows written twice and values that are not finite."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.runtime import strict_json
from student.reporting import metric_curves
from student.reporting.metric_curves import Curve
from student.training import metrics


def write(run: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    run.mkdir(exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return run


def kept_by_hand(values: np.ndarray, bucket: int) -> set[int]:
    """Of each bucket of steps 0, 1, ...: the first, least, greatest and last finite, the first
    other."""
    kept = set()
    for start in range(0, len(values), bucket):
        part = values[start : start + bucket]
        good, bad = np.flatnonzero(np.isfinite(part)), np.flatnonzero(~np.isfinite(part))
        if len(good):
            least, most = part[good].min(), part[good].max()
            kept |= {start + good[0], start + good[-1]}
            kept |= {start + good[part[good] == least][0], start + good[part[good] == most][-1]}
        if len(bad):
            kept.add(start + bad[0])
    return {int(at) for at in kept}


def test_thinning_by_hand() -> None:
    values = np.array([5.0, 1.0, 9.0, 4.0, 2.0, np.inf, np.nan, 3.0])
    assert metric_curves.thin(np.arange(8), values, 2).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert metric_curves.thin(np.arange(8), values, 3).tolist() == [0, 1, 2, 5, 7]


@given(
    st.lists(st.sampled_from([0.0, 1.0, -2.0, 1e9, np.nan, np.inf]), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_thinning_against_numpy(values: list[float], shift: int) -> None:
    given = np.array(values)
    kept = metric_curves.thin(np.arange(len(given)), given, shift).tolist()
    assert set(kept) == kept_by_hand(given, 1 << shift)
    assert kept == sorted(kept)


@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_a_curve_in_pieces_is_that_of_all_rows(pieces: int) -> None:
    values = np.random.default_rng(0).normal(size=9000)
    values[[17, 4096, 8191]] = [1e6, -1e6, np.nan]
    curve = Curve()
    for at in np.array_split(np.arange(9000), pieces):
        curve.add(at, values[at])
    assert curve.bucket == 64  # 9000 / 64 are 141 buckets, of 32 steps there were 282
    assert set(curve.steps.tolist()) == kept_by_hand(values, curve.bucket)
    assert {17, 4096, 8191} <= set(curve.steps.tolist())
    np.testing.assert_array_equal(curve.values, values[curve.steps])
    assert curve.nonfinite == 1
    assert len(curve.steps) <= metric_curves.POINTS


def test_a_short_curve_is_whole(tmp_path: Path) -> None:
    rows = [{"step": i, "epoch": 0, "loss": i / 7} for i in range(1, 1001)]
    curve = metric_curves.read(write(tmp_path / "run", rows)).columns["loss"]
    assert curve.steps.tolist() == list(range(1, 1001))
    assert curve.values.tolist() == [i / 7 for i in range(1, 1001)]
    assert curve.bucket == 1


def test_columns_of_few_rows_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.0, "lr": 1},
        {"step": 2, "loss": "nan", "lr": 2, "note": "a text", "probe_knn": 55.0, "left": None},
        {"step": 3, "loss": "-inf", "lr": 3, "flag": True},
    ]
    found = metric_curves.read(write(tmp_path / "run", rows))
    assert set(found.columns) == {"loss", "lr", "probe_knn"}
    loss = found.columns["loss"]
    np.testing.assert_array_equal(loss.values, [2.0, np.nan, -np.inf])
    assert (loss.nonfinite, found.columns["lr"].nonfinite) == (2, 0)
    assert found.columns["probe_knn"].steps.tolist() == [2]
    assert found.last is not None
    assert found.last["step"] == 3


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_a_step_that_is_written_twice_has_its_later_row(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_curves, "CHUNK_BYTES", chunk)
    old = [{"step": i, "loss": 100.0 + i, "stale": 1.0} for i in range(1, 11)]
    new = [{"step": i, "loss": float(i)} for i in range(6, 9)]
    found = metric_curves.read(write(tmp_path / "run", old + new))
    assert found.columns["loss"].values.tolist() == [
        101, 102, 103, 104, 105, 6, 7, 8, 109, 110,
    ]  # fmt: skip
    assert found.columns["stale"].steps.tolist() == [1, 2, 3, 4, 5, 9, 10]  # of the row as well
    assert found.rewritten == 3
    assert found.last is not None
    assert found.last["step"] == 10


def test_a_spike_that_was_written_again_is_gone_from_a_thinned_curve(tmp_path: Path) -> None:
    old = [{"step": i, "loss": 1e6 if i == 7777 else 1.0} for i in range(1, 20001)]
    new = [{"step": i, "loss": 2.0} for i in range(7000, 20001)]
    found = metric_curves.read(write(tmp_path / "run", old + new))
    assert found.columns["loss"].bucket > 1
    assert found.columns["loss"].values.max() == 2.0
    assert found.rewritten == 13001


def test_broken_lines_are_counted_and_the_first_is_told(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 3.0}, "{", {"step": 2, "loss": 2.0}, "[1]", '{"step": -1}',
        '{"step": 3, "loss": 1, "loss": 2}', '{"step": 4, "loss": NaN}', '{"loss": 1}',
        '{"step": 5, "loss": [1]}', '{"step": 1' + "0" * 30 + "}", "x" * (2 << 20),
        {"step": 6, "loss": 1.0},
    ]  # fmt: skip
    run = write(tmp_path / "run", rows)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"')  # is being written
    found = metric_curves.read(run)
    assert found.columns["loss"].steps.tolist() == [1, 2, 6]
    assert (found.lines, found.broken) == (12, 9)
    assert found.first_broken.startswith("line 2: ")


def test_too_many_columns_are_left_out_and_told(tmp_path: Path) -> None:
    rows = [{"step": 1, **{f"c{i}": 1.0 for i in range(metric_curves.COLUMNS + 3)}}]
    found = metric_curves.read(write(tmp_path / "run", rows))
    assert len(found.columns) == metric_curves.COLUMNS
    assert found.left_out == {f"c{metric_curves.COLUMNS + i}" for i in range(3)}


def test_a_link_or_pipe_is_no_file_of_rows(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [])
    (run / "metrics.jsonl").rename(run / "elsewhere")
    (run / "metrics.jsonl").symlink_to(run / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        metric_curves.read(run)


def test_the_time_of_steps_is_added_up(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "images_per_s": 10.0, "data_wait": 0.5},
        {"step": 2, "images_per_s": 20.0, "data_wait": 0.1},
        {"step": 3, "images_per_s": 0.0},
        {"step": 4, "images_per_s": 5e-324},
        {"step": 4},
    ]
    found = metric_curves.read(write(tmp_path / "run", rows))
    assert found.trained_s == pytest.approx(0.1 + 0.05)  # for a batch of one picture
    assert found.timed == 2
    assert found.waited_s == pytest.approx(0.5 * 0.1 + 0.1 * 0.05)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak is that of a piece, here a small one, not of the file."""
    monkeypatch.setattr(metric_curves, "CHUNK_BYTES", 1 << 16)
    line = '{{"step": {}, "epoch": 0, "loss": 0.51234567, "align": 0.51234567, "lr": 0.0001}}\n'
    peaks = []
    for count in (5_000, 10_000):
        run = tmp_path / str(count)
        run.mkdir()
        with (run / "metrics.jsonl").open("w") as file:
            file.writelines(line.format(i) for i in range(count))
        tracemalloc.start()
        assert metric_curves.read(run).lines == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 20 * metric_curves.CHUNK_BYTES


# --- the fast way to read a row -------------------------------------------------------------------

values = st.one_of(
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
)  # fmt: skip


@given(st.dictionaries(st.one_of(st.just("step"), st.text(max_size=4)), values, max_size=5))
def test_a_row_is_read_the_same_fast_or_strictly(row: dict[str, Any]) -> None:
    line = json.dumps(row).encode()
    fast = metrics.plain_row(line)
    assert fast is None or fast == strict_json.parse_object(line)
    assert metrics.plain_row(b'{"step": 1, "loss": 2.5}') == {"step": 1, "loss": 2.5}


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "loss": 1, "loss": 2}', '{"step": 1, "loss": NaN}', '{"step": 1.0}',
        '{"step": 1, "loss": 1e999}', '{"step": true}', '{"step": -1}', "[1]", "",
        '{"step": 1, "x": 1' + "0" * 400 + ', "y": -1' + "0" * 400 + "}",
        '{"step": 1, "a" :1, "a" :2, "x\\\\":":3}',
        '{"step": 1, "x": 1' + "0" * 400 + "}", '{"step": 1, "x": ' + "[" * 5000, '{"step": 1} 2',
    ],
)  # fmt: skip
def test_what_is_no_plain_row_is_left_to_the_strict_reader(line: str) -> None:
    assert metrics.plain_row(line.encode()) is None
    assert metrics.plain_row(b'{"step": 1, "a": 1e300, "b": -1e300}') is None
    with pytest.raises(ValueError, match=r"\w"):
        metrics.parse_row(line.encode())
