"""A page of runs: in a real browser, and with whatever is missing, damaged or a stranger's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student.reporting import report
from student.reporting.metric_curves import Curve
from student.reporting.sections import line_chart
from tests import student_fixtures as fx
from tests.browser import SHARED, open_page

pytestmark = SHARED

HOSTILE = '<script>alert("1")</script>\x1b[31m\u202e&'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of small students; one has scores of probes, clipped gradients and a result."""
    folder = tmp_path_factory.mktemp("report")
    cache = ("--cache", fx.ranked_path(), "--steps", "12", "--batch-size", "8")
    labelled = fx.save_pictures(folder / "labelled", 12, classes=2)
    fx.good(fx.train("mralign", folder / "mralign", *cache))
    probed = ("--probe", labelled, "--probe-every", "1")
    fx.good(fx.train("maskalign", folder / "maskalign", *cache, *probed, sets=("clip_grad=3",)))
    online = ("--images", fx.pictures(), "--policy", fx.policy_file(), "--steps", "4")
    fx.good(fx.train("mae", folder / "mae", *online, "--batch-size", "8", sets=("patch_size=8",)))
    result = {
        "time": "2026-01-02T03:04:05Z", "run": "r", "protocol": "linear", "test": "val",
        "n_test": 50, "score": 61.5, "interval": [48.0, 74.0], "checkpoint": 12,
        "settings": {"blr": 0.1},
    }  # fmt: skip
    (folder / "maskalign/results.jsonl").write_text(json.dumps(result) + "\n")
    return folder


def make(runs: Path, *names: str, out: Path, more: tuple[Any, ...] = ()) -> dict[str, Any]:
    ran = fx.good(
        fx.stud("report", *(runs / name for name in names), "--out", out, "--json", *more)
    )
    return ran.json


SHOWN = ("--cache", fx.ranked_path, "--count", "2")


def options(*given: Any) -> tuple[Any, ...]:
    return tuple(each() if callable(each) else each for each in given)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
def test_two_runs_in_a_browser(width: int, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    facts = make(runs, "mralign", "maskalign", out=out, more=options(*SHOWN))
    page = open_page(out, width, dark=width == 360)
    page.check()
    assert not page.files
    # a view, the teacher and 2 students twice; as many without the view; 5 masks of two ratios;
    # the view and two pictures of the one student that predicts pixels, twice
    assert len(page.images) == 2 * 4 + 2 * 3 + 2 * 5 + 2 * 3
    assert page.svgs >= len(facts["charts"]) > 10
    assert {"loss", "lr", "grad_norm", "probe_knn", "rankme", "data_wait"} <= set(facts["charts"])
    assert facts["sections"] == [name for name, _, _ in report.SECTIONS]
    assert facts["missing"] == []
    assert facts["ablation"]
    assert "61.50" in page.text
    assert "48.00 to 74.00" in page.text


@pytest.mark.slow
def test_a_page_is_the_same_each_time_and_holds_no_script(runs: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        make(runs, "maskalign", out=tmp_path / name, more=options(*SHOWN))
    first = (tmp_path / "a.html").read_bytes()
    assert first == (tmp_path / "b.html").read_bytes()
    assert first.startswith(report.MARK)
    assert b"<script" not in first
    assert b'http-equiv="Content-Security-Policy" content="default-src \'none\'' in first
    assert set(re.findall(rb'(?:href|src)="([^"#]{0,4})', first)) <= {b"", b"data"}
    ids = re.findall(rb' id="([^"]+)"', first)
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_an_online_run_is_shown_pictures_alone(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    facts = make(runs, "mae", out=out, more=("--images", fx.pictures(), "--count", "1"))
    assert {"attention", "features", "masks", "reconstructions"} <= set(facts["sections"])
    assert "alignment" not in facts["sections"]
    assert any("--cache" in what for what in facts["missing"])
    page = open_page(out, 360)
    page.check()
    assert len(page.images) == 2 + 1 + 2 + 3  # uniform and blockwise need no teacher


@pytest.mark.slow
def test_without_cache_and_pictures_the_page_says_what_brings_them(
    runs: Path, tmp_path: Path
) -> None:
    facts = make(runs, "mralign", out=tmp_path / "page.html")
    assert facts["pictures"] == []
    assert {"curves", "settings", "costs", "alignment"} <= set(facts["sections"])
    assert not {"attention", "features", "masks", "reconstructions"} & set(facts["sections"])
    text = " ".join(facts["missing"])
    assert "--cache" in text
    assert "--images" in text
    assert "clip_grad" in text
    assert "--probe" in text
    assert "student eval" in text


@pytest.mark.slow
def test_a_cache_without_pixels_gives_the_teacher_alone(runs: Path, tmp_path: Path) -> None:
    more = ("--cache", fx.cache_path(), "--count", "1")
    facts = make(runs, "mralign", out=tmp_path / "page.html", more=more)
    assert {"attention", "features", "masks"} <= set(facts["sections"])
    assert "reconstructions" not in facts["sections"]
    assert any("--images" in what for what in facts["missing"])
    page = open_page(tmp_path / "page.html", 1400)
    page.check()
    assert len(page.images) == 2 + 1 + 5


@pytest.mark.slow
def test_a_kept_cache_hatches_what_it_has_not(runs: Path, tmp_path: Path) -> None:
    more = ("--cache", fx.kept_path(), "--images", fx.pictures(), "--count", "1")
    facts = make(runs, "mralign", out=tmp_path / "page.html", more=more)
    assert facts["missing"] == make_missing(runs, tmp_path)
    open_page(tmp_path / "page.html", 1400).check()


def make_missing(runs: Path, tmp_path: Path) -> list[str]:
    """What is missing of a whole cache and its pictures: that of the run itself."""
    more = options("--cache", fx.ranked_path, "--count", "1")
    return make(runs, "mralign", out=tmp_path / "whole.html", more=more)["missing"]


@pytest.mark.slow
def test_the_cache_of_a_run_is_found_by_its_id(runs: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine").symlink_to(fx.ranked_path())
    (home / "other").symlink_to(fx.kept_path())
    words = ("report", runs / "mralign", "--out", tmp_path / "p.html", "--json", "--count", "1")
    facts = fx.good(fx.stud(*words, home=home)).json
    assert "attention" in facts["sections"]


# --- curves ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_rows_make_a_small_page(count: int, runs: Path, tmp_path: Path) -> None:
    names = ("align", "pixel", *(f"level_{level}" for level in range(8, 13)))
    copy_with_rows(
        runs, tmp_path / "long",
        ({"step": i, "loss": 1 + (i * 7 % 13) / 13, "lr": 1e-4,
          **{name: 1 + (i * len(name) % 17) / 17 for name in names}}
         for i in range(1, count + 1)),
    )  # fmt: skip
    facts = make(tmp_path, "long", out=tmp_path / "page.html")
    assert facts["bytes"] < 400_000  # 5 MB are allowed
    assert facts["runs"][0]["step"] == count
    open_page(tmp_path / "page.html", 360).check()


def copy_with_rows(runs: Path, run: Path, rows: Any) -> Path:
    shutil.copytree(runs / "mralign", run)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return run


def test_rows_that_are_not_finite_are_marked_and_broken_ones_told(
    runs: Path, tmp_path: Path
) -> None:
    rows = [
        {"step": i, "loss": "nan" if i in (5, 9) else 1 / i, "skipped": (i >= 5) + (i >= 9)}
        for i in range(1, 13)
    ]
    run = copy_with_rows(runs, tmp_path / "odd", rows)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    facts = make(tmp_path, "odd", out=tmp_path / "page.html")
    assert any("1 of 13 lines" in what for what in facts["missing"])
    page = open_page(tmp_path / "page.html", 360)
    page.check()
    assert "\u00d7 not finite, run 1: 2 rows" in page.text
    assert "left out 2 steps" in page.text


MARKED = [1.0, np.nan, 2.0], [1.0, 1.5, 2.0]


def test_a_chart_marks_a_step_that_is_not_finite() -> None:
    def chart(values: list[float]) -> str:
        curve = Curve(np.arange(len(values)), np.array(values))
        return line_chart.draw("t", [line_chart.Series(0, curve)], len(values))

    marks = [set(re.findall(r'href="#(m\w+)"', chart(each))) for each in MARKED]
    assert [len(each) for each in marks] == [2, 1]  # points and a cross; points
    assert marks[1] < marks[0]
    assert "var(--series-1)" in chart([1.0])
    assert "#0" not in re.sub(r"#[pm][0-9a-f]+", "", chart([1.0, 2.0]))


def test_a_title_that_is_no_unicode_is_shown() -> None:
    curve = Curve(np.arange(2), np.ones(2))
    svg = line_chart.draw("half \ud800", [line_chart.Series(0, curve)], 2)
    assert 'aria-label="half \\ud800"' in svg.encode().decode()


def test_an_axis_is_logarithmic_where_values_are_far_apart() -> None:
    def of(*values: float) -> bool:
        curve = Curve(np.arange(len(values)), np.array(values))
        return line_chart.is_logarithmic([line_chart.Series(0, curve)])

    assert of(*[1] * 40, 31, np.nan)
    assert not of(*[1] * 40, 29)
    assert not of(*[1] * 40, 1e-9)
    assert not of(0, 1e9)
    assert not of(np.inf)


def test_eighteen_runs_are_told_apart_and_nineteen_are_refused(runs: Path, tmp_path: Path) -> None:
    samples = {line_chart.sample(i) for i in range(line_chart.MOST_RUNS)}
    assert len(samples) == line_chart.MOST_RUNS
    ran = fx.stud("report", *[runs / "mae"] * 19, "--out", tmp_path / "page.html")
    assert (ran.status, "19 runs" in ran.line) == (2, True)


# --- strangers' texts and files -------------------------------------------------------------------


@pytest.mark.slow
def test_what_strangers_wrote_is_shown_and_not_carried_out(runs: Path, tmp_path: Path) -> None:
    run = copy_with_rows(
        runs, tmp_path / "<b>odd&", [{"step": 1, "loss": 1.0, HOSTILE: 2.0, "$x$": 1.0}]
    )
    record = json.loads((run / "config.json").read_text())
    record["config"][HOSTILE] = HOSTILE
    record["precision"] = HOSTILE
    (run / "config.json").write_text(json.dumps(record))
    about = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**about, "device": HOSTILE}))
    make(run.parent, run.name, out=tmp_path / "page.html", more=options(*SHOWN))
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    page = open_page(tmp_path / "page.html", 360)
    page.check()
    assert '<script>alert("1")</script>\\x1b[31m\\u202e&' in page.text


@pytest.mark.slow
def test_a_recipe_of_ones_own_is_not_run(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "own"
    shutil.copytree(runs / "mralign", run)
    record = json.loads((run / "config.json").read_text())
    mine = tmp_path / "mine.py"
    mine.write_text("raise SystemExit('this file was run')\n")
    (run / "config.json").write_text(json.dumps({**record, "recipe": str(mine)}))
    facts = make(tmp_path, "own", out=tmp_path / "page.html", more=options(*SHOWN))
    assert "attention" in facts["sections"]  # the encoder is one of ours
    assert not {"alignment", "reconstructions"} & set(facts["sections"])


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_pictures_alone(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "bad"
    shutil.copytree(runs / "mralign", run)
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    facts = make(tmp_path, "bad", out=tmp_path / "page.html", more=options(*SHOWN))
    assert "curves" in facts["sections"]
    assert any("cannot be read" in what for what in facts["missing"])


@pytest.mark.slow
def test_features_that_are_not_finite_are_told(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "huge"
    shutil.copytree(runs / "mralign", run)
    newest = max((run / "checkpoints").iterdir())
    saved = torch.load(newest, weights_only=True)
    saved["model"]["encoder.norm.weight"].fill_(3e38)
    torch.save(saved, newest)
    facts = make(tmp_path, "huge", out=tmp_path / "page.html", more=options(*SHOWN))
    assert any("not finite" in what for what in facts["missing"])
    assert "attention" in facts["sections"]  # the teacher's


@pytest.mark.slow
def test_a_file_that_is_no_report_is_left_alone(runs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine</html>")
    (tmp_path / "link.html").symlink_to(mine)
    for out, why in (
        (mine, "is no report"), (tmp_path / "link.html", "no plain file"),
        (tmp_path, "no plain file"), (tmp_path / "none/page.html", "no folder"),
    ):  # fmt: skip
        ran = fx.stud("report", runs / "mae", "--out", out)
        assert (ran.status, why in ran.line) == (2, True)
    assert mine.read_text() == "<html>mine</html>"
    for _ in range(2):
        make(runs, "mae", out=tmp_path / "page.html")
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "link.html", "mine.html", "page.html",
    ]  # fmt: skip


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda run: (run / "config.json").unlink(), "no run at"),
        (lambda run: (run / "metrics.jsonl").unlink(), "No such file"),
        (lambda run: (run / "config.json").write_text("{"), "is damaged"),
    ],
)
def test_a_damaged_run_is_one_line(spoil: Any, why: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "mae", tmp_path / "bad")
    spoil(tmp_path / "bad")
    ran = fx.stud("report", tmp_path / "bad", "--out", tmp_path / "page.html")
    assert (ran.status, why in ran.line) == (1, True)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_the_examples_of_the_page_run(runs: Path, tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs/seeing.md"
    lines = re.findall(r"^    student (report .*)$", page.read_text(), re.M)
    assert len(lines) >= 2
    known = {
        "runs/mralign-s0": runs / "mralign", "runs/mralign-mask60": runs / "maskalign",
        "CACHE": fx.ranked_path(), "train/": fx.pictures(),
    }  # fmt: skip
    for number, line in enumerate(lines):
        words = [str(known.get(word, word)) for word in shlex.split(line)]
        at = words.index("--out") + 1
        words[at] = str(tmp_path / f"{number}.html")
        assert words[at] in fx.good(fx.stud(*words)).out
        assert Path(words[at]).read_bytes().startswith(report.MARK)
