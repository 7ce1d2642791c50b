"""A person at a terminal sees the progress of a run, and a log has a line every half minute."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from featcache.console import progress_bar as console_bar
from student.setup import eval_options
from student.training import progress_bar
from tests import student_fixtures as fx


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROW = {
    "step": 30,
    "epoch": 2,
    "loss": 1.23456,
    "align": 0.5,
    "level_3": 9.0,
    "grad_norm": 2.0,
    "lr": 0.00025,
    "images_per_s": 812.4,
    "data_wait": 0.04,
}


def test_a_line_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 30 of epochs of 12 steps: two and a half of them are over. Each level's loss would fill
    the line."""
    monkeypatch.setattr(progress_bar, "memory_bytes", lambda: 3_140_000_000)
    assert progress_bar.line(ROW, 12) == (
        "epoch 2.50  loss 1.2346 align 0.5 grad_norm 2  lr 2.50e-04  812 images/s  waiting for "
        "data 4%  3.1 GB"
    )


def test_a_terminal_shows_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps done, the time left, and the line."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with progress_bar.shown(100, 20, 12, True) as bar:
        for step in range(21, 31):
            bar.update_with(step, [{**ROW, "step": step}])
    last = out.getvalue().split("\r")[-1]
    assert "30/100" in last
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", last), last  # passed < left
    assert "loss 1.2346" in last


def test_the_last_scores_of_a_probe_stay_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows have them; what would fill the line is in the metrics alone."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    scores = {"probe_knn": 41.5, "probe_linear": 52.25, "rankme": 7.0, "probe_s": 0.5}
    with progress_bar.shown(100, 20, 12, True) as bar:
        bar.update_with(24, [{**ROW, **scores, "cosine_12": 0.7}])
        for step in range(25, 31):
            bar.update_with(step, [ROW])
    last = out.getvalue().split("\r")[-1]
    assert "grad_norm 2 probe_knn 41.5 probe_linear 52.25  lr" in last
    assert "rankme" not in out.getvalue()
    assert "cosine" not in out.getvalue()


def test_a_log_has_a_line_every_half_minute_and_one_of_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of 4 s, from step 20 on: lines after 32 s and 64 s, and of the end. The time left is
    that of 4 s a step, whatever an earlier process did."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress_bar, "memory_bytes", lambda: 3_140_000_000)
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    with progress_bar.shown(100, 20, 12, True) as bar:
        for step in range(21, 40):
            now[0] += 4
            bar.update_with(step, [{**ROW, "step": step}])
    said = out.getvalue().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    for text, done, left in zip(
        said, (28, 36, 39), ("00:04:48", "00:04:16", "00:04:04"), strict=True
    ):
        begin = rf"{stamp} train: {done} of 100 steps, epoch [\d.]+  loss 1\.2346 "
        assert re.fullmatch(rf"{begin}.*  812 images/s .*, ETA {left}", text), text
    assert "\r" not in out.getvalue()


def test_nothing_is_shown_by_others_or_of_short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a moment into a file, not by another process than the first."""
    for out, speaks in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", out)
        with progress_bar.shown(10, 0, 12, speaks) as bar:
            bar.update_with(30, [ROW])
        assert out.getvalue() == ""


def test_an_evaluation_shows_a_bar_a_stage_or_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = {}
    for out in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", out)
        with eval_options.stage_bars() as progress:
            for stage, done, total in (("train", 4, 9), ("train", 9, 9), ("test", 3, 3)):
                progress(stage, done, total)
        shown[type(out)] = out.getvalue()
    assert re.search(r"train: 100%.* 9/9 .*\n.*test: 100%.* 3/3 ", shown[Terminal])
    assert shown[io.StringIO] == ""
    # half a minute later
    monkeypatch.setattr(console_bar, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    with eval_options.stage_bars() as progress:
        progress("train", 4, 9)
        progress("train", 9, 9)
    line = r"[\d-]{10}T[\d:]{8}Z train: 9 of 9 pictures, [\d.,]+ pictures/s, ETA 00:00:00\n"
    assert re.fullmatch(line, out.getvalue())


def test_a_whole_command_in_a_file_says_what_it_does_and_no_more(tmp_path: Path) -> None:
    ran = fx.good(
        fx.train(
            "mralign",
            tmp_path / "run",
            "--cache",
            fx.cache_path(),
            "--steps",
            "3",
            "--batch-size",
            "8",
        )
    )
    announced, checked = ran.err.splitlines()
    assert announced.startswith("recipe mralign: 24 pictures, cache ")
    assert checked.startswith("note: checked 24 pictures of 1 shard against the cache")
    assert "\r" not in ran.err


@pytest.mark.slow
def test_memory_is_that_of_this_process() -> None:
    """As the kernel tells it, and more after more was used."""
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    assert progress_bar.host_bytes() == pytest.approx(peak, rel=0.05)
    before = progress_bar.host_bytes()
    block = torch.ones((before + (256 << 20)) // 8, dtype=torch.float64)
    assert progress_bar.host_bytes() > before
    assert len(block)
