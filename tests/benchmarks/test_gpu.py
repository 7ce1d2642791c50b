"""The program for whoever has a GPU for minutes: what fails or hangs costs itself alone, and runs
are merged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import null_store
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import extraction, results, runner, worker
from benchmarks.gpu.bench import open_bench
from benchmarks.gpu.plan import GPU_TESTS, PLAN, TRIAL, Measurement
from benchmarks.gpu.results import Entry, Results, Row
from featcache.errors import UsageError, UserError
from featcache.storage.store import STORES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/gpu.md").read_text()
SMALL = "tests.benchmarks.gpu_cases:open_small"


def case(name: str, box_s: int = 60, least_s: int = 1, **options: Any) -> Measurement:
    return Measurement(
        name, f"It {name}.", f"tests.benchmarks.gpu_cases:{name}", least_s, box_s, options
    )


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or does within five seconds."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return False


def measure(
    cases: list[Measurement], folder: Path, seconds: float = 300.0
) -> tuple[dict[str, Entry], list[str]]:
    """Entries by name, and the lines that were said."""
    options = worker.WorkerOptions(folder, folder / "log.txt", "cpu", TRIAL, 1, SMALL)
    kept: dict[str, Entry] = {}
    lines: list[str] = []
    with runner.closing_worker(options) as own:
        runner.run(cases, own, time.monotonic() + seconds, kept.__setitem__, lines.append)
    return kept, lines


@pytest.mark.slow
def test_what_fails_hangs_or_dies_costs_itself_alone(tmp_path: Path) -> None:
    """Rows that came before are kept, others go on in a fresh process, and no process is left."""
    note = tmp_path / "pid"
    cases = [
        case("gives"),
        case("fails"),
        case("sleeps", box_s=4, note=str(note)),
        case("dies"),
        case("exits"),
        Measurement("last", "It gives.", "tests.benchmarks.gpu_cases:gives", 1, 60, {"value": 2.0}),
    ]
    kept, lines = measure(cases, tmp_path)
    assert {name: (entry.status, entry.reason) for name, entry in kept.items()} == {
        "gives": ("done", ""),
        "fails": ("failed", "RuntimeError: CUDA error: an illegal memory access"),
        "sleeps": ("ended by its time box", "after 4 s"),
        "dies": ("failed", "its process was ended by SIGSEGV"),
        "exits": ("failed", "its process ended with exit status 3"),
        "last": ("done", ""),
    }
    rows = {name: [(row.label, row.value) for row in entry.rows] for name, entry in kept.items()}
    assert rows == {
        "gives": [("a row", 1.0)],
        "fails": [("before it fails", 2.0)],
        "sleeps": [("before it sleeps", 3.0)],
        "dies": [],
        "exits": [],
        "last": [("a row", 2.0)],
    }
    assert "a row: 2 ratio  (goal at most 1.03: MISSED)" in " ".join(lines)
    assert is_gone(int(note.read_text()))
    assert "illegal memory access" in (tmp_path / "log.txt").read_text()


def test_what_does_not_fit_is_not_run(tmp_path: Path) -> None:
    kept, _ = measure([case("gives", least_s=40), case("fails", least_s=5)], tmp_path, seconds=20)
    assert kept["gives"].status == "not run"
    assert "it wants 40" in kept["gives"].reason
    assert kept["fails"].status == "failed"  # what comes after it may be shorter


@pytest.mark.slow
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "cuda" in line
    assert "--trial" in line


def test_a_log_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    out.mkdir()
    other.write_text("mine")
    (out / program.LOG).symlink_to(other)
    with pytest.raises(UserError, match=r"log\.txt' is a link, or no file"):
        program.cli.main(["--trial", "--out", str(out)], standalone_mode=False)
    assert other.read_text() == "mine"


@pytest.mark.slow
def test_what_lies_in_a_folder_is_of_its_sizes_and_others_files_stay(tmp_path: Path) -> None:
    """The folder is a person's own, and may be used by a trial first."""
    (tmp_path / "extracted").mkdir()
    (tmp_path / "extracted/mine").write_text("mine")
    made = []
    for sizes in (TRIAL, replace(TRIAL, pictures=9), TRIAL):
        options = worker.WorkerOptions(tmp_path, tmp_path / "log.txt", "cpu", sizes, 1)
        bench, _ = open_bench(options, lambda row: None)
        made.append(bench.pictures())
    assert [len(list(folder.rglob("*.jpg"))) for folder in made] == [8, 9, 8]
    assert made[0] == made[2]
    extraction.extraction(bench, "clip-b16")
    assert null_store.NAME not in STORES
    assert (tmp_path / "extracted/mine").read_text() == "mine"
    kept = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert kept == ["extracted", "pictures", "pictures"]


def test_a_folder_that_was_not_made_to_its_end_is_not_used(tmp_path: Path) -> None:
    options = worker.WorkerOptions(tmp_path, tmp_path / "log.txt", "cpu", TRIAL, 1)
    bench, _ = open_bench(options, lambda row: None)
    (bench.pictures().parent / "made").unlink()
    again = bench.pictures()
    assert again.parent.name.endswith("-1")
    assert len(list(again.rglob("*.jpg"))) == 8


# ------------------------------------------------------------ results


def row(value: float | None, **more: Any) -> Row:
    return Row(label="x", value=value, **more)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (row(1.03, at_most=1.03), "ok"),
        (row(1.04, at_most=1.03), "MISSED"),
        (row(1.5, at_least=1.5), "ok"),
        (row(1.49, at_least=1.5), "MISSED"),
        (row(float("nan"), at_most=1.0), "MISSED"),
        (row(7.0), ""),
        (row(None, at_most=1.0), ""),
    ],
)
def test_a_goal_is_reached_or_missed(given: Row, verdict: str) -> None:
    assert given.verdict == verdict


def some() -> Results:
    return Results(
        sizes="real",
        machine={"device": "NVIDIA H200", "driver": "580.1", "GPU memory GiB": 139.8},
        versions={"torch": "2.11"},
        commit="b" * 40,
        settings="Steps of 256 pictures.",
        measurements={
            "step-b16": Entry(
                title="A step.",
                status="done",
                seconds=61.0,
                commit="a" * 40,
                rows=[Row(label="cached / in memory", value=1.0125, at_most=1.03)],
            ),
            "memory": Entry(
                title="Memory.",
                status="failed",
                reason="it | <b>\x1b[2J",
                rows=[Row(label="batch 2,048", value=None, note="out of memory")],
            ),
        },
    )


def test_the_page_tells_hardware_goals_and_what_is_missing() -> None:
    page = results.markdown(some())
    assert "device NVIDIA H200, driver 580.1, GPU memory GiB 139.8, torch 2.11; commit bbb" in page
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if "|" in line
    ]
    assert table[2:] == [
        ["step-b16", "cached / in memory", "1.012", "at most 1.03", "ok"],
        ["memory", "batch 2,048", "-", "", ""],
        ["memory", "failed: it / &lt;b>\\x1b[2J", "", "", ""],
    ]
    assert f"- **step-b16**: A step. (61 s, commit {'a' * 40})" in page
    assert "  - batch 2,048: out of memory" in page


def test_what_others_wrote_reaches_no_terminal_raw() -> None:
    esc = "\x1b]0;title\x07"
    row = Row(label=esc, value=1.0, unit=esc, note=esc)
    entry = Entry(title=esc, status="failed", reason=esc, commit=esc, seconds=1.0, rows=[row])
    found = Results(
        sizes="real",
        machine={esc: esc},
        versions={esc: esc},
        settings=esc,
        measurements={esc: entry},
    )
    page = results.markdown(found)
    assert page.replace("\n", "").isprintable()
    assert page.count("title") == 13


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results.save(tmp_path, some())
    assert results.load(tmp_path, "real") == some()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 2, "sizes": "real"}',
        '{"format": 1, "sizes": "real", "measurements": {"x": {"title": 3}}}',
        '{"format": 1, "sizes": "real", "measurements": []}',
        '{"format": 1, "sizes": "real", "sizes": "real"}',
        '{"format": 1, "sizes": "trial"}',
        "[" * 100_000,
    ],
)
def test_results_of_others_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / results.JSON).write_text(text)
    with pytest.raises(UserError, match=r"give another --out$") as raised:
        results.load(tmp_path, "real")
    assert "\n" not in str(raised.value)
    assert (tmp_path / results.JSON).read_text() == text


def test_another_machine_s_results_are_not_added_to() -> None:
    results.check_machine(some(), {"device": "NVIDIA H200"})
    with pytest.raises(UserError, match=r"are of NVIDIA H200, and this machine has NVIDIA A100"):
        results.check_machine(some(), {"device": "NVIDIA A100"})


# ------------------------------------------------------------ the command


def test_every_measurement_can_be_called() -> None:
    assert len({each.name for each in PLAN}) == len(PLAN)
    for each in PLAN:
        assert callable(each.load())
        assert 0 < each.least_s <= each.box_s


def test_every_test_that_needs_a_gpu_is_run() -> None:
    mark = "@pytest.mark." + "gpu"
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if mark in path.read_text()
    }
    assert set(GPU_TESTS) == found


def test_a_second_run_takes_up_what_is_missing_first_what_was_never_tried() -> None:
    tried = {
        "step-b16": "done",
        "exact": "failed",
        "data": "done",
        "memory": "ended by its time box",
    }
    before = Results(
        sizes="real",
        measurements={name: Entry(title="", status=status) for name, status in tried.items()},
    )
    before.measurements["kernels"] = Entry(title="")
    names = [each.name for each in program._missing(PLAN, before)]
    assert names[:2] == ["kernels", "extract-b16"]
    assert names[-2:] == ["exact", "memory"]
    assert len(names) == len(PLAN) - 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--out is needed"),
        (("--out", "x", "--only", "kernel"), "--only: unknown 'kernel'; did you mean kernels?"),
    ],
)
def test_what_cannot_be_asked(args: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        program.cli.main(list(args), standalone_mode=False)
    assert said in str(raised.value)


def test_the_list_names_every_measurement() -> None:
    done = CliRunner().invoke(program.cli, ["--list"])
    assert [line.split()[0] for line in done.output.splitlines()] == [each.name for each in PLAN]


def test_the_page_names_every_measurement_and_option() -> None:
    for each in PLAN:
        assert f"`{each.name}`" in PAGE, each.name
    known = {option for param in program.cli.params for option in param.opts}
    lines = [line for line in PAGE.splitlines() if line.startswith("python -m benchmarks.gpu")]
    assert len(lines) == 5
    for line in lines:
        assert set(re.findall(r"--[a-z-]+", line.partition("#")[0])) <= known, line


def test_the_page_names_what_a_machine_with_pytorch_lacks() -> None:
    """Every dependency is one of those that such a machine has, or is named, with a version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[><=\[]", text)[0] for text in project["dependencies"]}
    section = PAGE.split("## What a machine with PyTorch still lacks")[1].split("## ")[0]
    there = set(re.findall(r"[a-z_]+", section.split("```")[0]))
    named = set(section.split("```")[1].split())
    assert wanted <= there | named
    pinned = dict(re.findall(r"([\w-]+)==([\d.post]+)", section))
    assert set(pinned) == named


@pytest.mark.slow
def test_a_trial_measures_everything(tmp_path: Path) -> None:
    """And the same command again has nothing to do."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--trial",
        "--minutes",
        "20",  # four are enough on idle cores
        "--out",
        str(out),
    ]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-4000:]
    found = json.loads((out / results.JSON).read_text())["measurements"]
    assert [*found] == [each.name for each in PLAN]
    assert {entry["status"] for entry in found.values()} == {"done"}
    assert all(entry["rows"] for entry in found.values())
    lacking = [
        (name, each["label"])
        for name, entry in found.items()
        for each in entry["rows"]
        if each.get("value") is None
    ]
    assert lacking == []
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert again.stdout.startswith("all is measured")
