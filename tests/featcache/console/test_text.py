"""Sizes, tables and progress are formatted for a terminal and for a log."""

from __future__ import annotations

import calendar
import json
import re
import sys
import time

import pytest

from featcache.console.params import require_images
from featcache.console.progress_bar import ProgressBar
from featcache.console.text import first_paragraph, format_bytes, format_table, print_facts
from featcache.errors import UsageError


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_512_960, "1.5 MB"),
        (999_940, "999.9 kB"),
        (999_960, "1.0 MB"),
        (5.4e9, "5.4 GB"),
        (1.94e12, "1.94 TB"),
        (2.5e15, "2500.00 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_a_table_is_as_wide_as_it_must_be() -> None:
    rows = [("name", "bytes", ""), ("a", "1", "x"), ("longer", "1000", "")]
    assert format_table(rows, right=[1]) == "name    bytes\na           1  x\nlonger   1000"
    assert format_table(rows) == "name    bytes\na       1      x\nlonger  1000"
    assert format_table([("one",)]) == "one"


def test_given_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_IMAGES", "there")
    assert (require_images("here"), require_images(None)) == ("here", "there")
    monkeypatch.setenv("FEATCACHE_IMAGES", "")
    with pytest.raises(UsageError, match=r"--images SRC is a folder.*FEATCACHE_IMAGES"):
        require_images(None)


def test_facts_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts({"a": 1}, False, "one")
    assert capsys.readouterr().out == "one\n"
    print_facts({"a": 1}, True, "one")
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_the_first_paragraph_is_one_line() -> None:
    text = """\n    A sentence of
    two lines.

    The rest.
    """
    assert first_paragraph(text) == "A sentence of two lines."
    assert first_paragraph("One.") == "One."
    assert first_paragraph(None) == ""


def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at once, so that short work says nothing."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    then = calendar.timegm((2026, 3, 4, 5, 6, 7))
    gmtime = time.gmtime
    monkeypatch.setattr("time.gmtime", lambda *seconds: gmtime(*(seconds or (then,))))
    bar = ProgressBar("verify", "shards", lambda done, total: f"{100 * done // total} %")
    for done, clock[0] in ((1, 100.0), (2, 110.0), (3, 140.0), (4, 150.0), (5, 171.0)):
        bar(done, 8)
    bar.close()
    # 3 in 40 s: 5 more in 66.7 s; 5 in 71 s: 3 more in 42.6 s
    assert capsys.readouterr().err == (
        "2026-03-04T05:06:07Z verify: 3 of 8 shards, 0.1 shards/s, ETA 00:01:06, 37 %\n"
        "2026-03-04T05:06:07Z verify: 5 of 8 shards, 0.1 shards/s, ETA 00:00:42, 62 %\n"
    )


def test_what_an_earlier_command_did_is_shown_and_makes_no_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """900 of 1,000 were there; 20 more took 40 s, so 80 more take 160 s."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    bar = ProgressBar("extract", "pictures", first=900)
    bar(900, 1000)
    clock[0] = 40.0
    bar(920, 1000)
    bar.close()
    line = capsys.readouterr().err.partition(" ")[2]
    assert line == "extract: 920 of 1000 pictures, 0.5 pictures/s, ETA 00:02:40\n"


def test_a_bar_has_one_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own, or that of its text."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for rated in (False, True):
        bar = ProgressBar("train", "steps", lambda done, total: "8 images/s", rated=rated)
        bar(1, 10)
        bar.close()
        shown = capsys.readouterr().err
        assert "1/10" in shown
        assert "8 images/s" in shown
        assert (re.search(r"steps/s|s/steps", shown) is None) == rated


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = ProgressBar("extract", "pictures", lambda done, total: "fast")
    bar(3, 10)
    bar(10, 12)
    bar.close()
    bar.close()
    shown = capsys.readouterr().err
    assert "extract" in shown
    assert "10/12" in shown
    assert "fast" in shown
