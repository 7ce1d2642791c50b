"""Running jobs: what is done is skipped, what broke goes on, what changed or is foreign is
refused. The jobs are a small program that notes each of its runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from featcache.errors import UserError
from pipelines.ablate import folder as folders
from pipelines.ablate import runner
from pipelines.ablate.folder import Folder
from pipelines.ablate.plan import Job

PROGRAM = """
import json, os, pathlib, signal, sys, time
what, out, orders, *rest = sys.argv[1:]
orders = pathlib.Path(orders)
with (orders / "runs").open("a") as file:
    file.write(" ".join([what, *rest]) + chr(10))
wish = orders / what
if wish.exists():
    wish_text = wish.read_text()
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    (pathlib.Path(out) / "half").touch()
    if wish_text == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if wish_text == "wait":
        time.sleep(60)
    sys.exit("no luck")
if what == "score":
    print("a word before")
    print(json.dumps({"top1": 12.5}))
else:
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "proof").write_text(" ".join(rest))
    print(what, "made", sorted(path.name for path in folder.iterdir()))
"""
MADE_BY = {"cores": 2}
ABOUT = {"table": "models", "scale": "digits", "reduced": False}


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a job's name says how it breaks, and `runs` what has run."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program/stand_in.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "program"), prepend=os.pathsep)
    (tmp_path / "orders").mkdir()
    return tmp_path / "orders"


def make_jobs(out: Path, orders: Path, length: str = "5") -> list[Job]:
    def job(name: str, after: tuple[str, ...], makes: Path | None, *rest: str, **more: bool) -> Job:
        words = ("stand_in", name, str(makes or "-"), str(orders), *rest)
        proof = (makes or out / "seed-0/run") / "proof"
        return Job(f"seed-0/{name}", name, words, after, proof, makes, row=name, **more)

    return [
        job("data", (), out / "seed-0/data", restarted=True),
        job("run", ("seed-0/data",), out / "seed-0/run", length),
        replace(job("score", ("seed-0/run",), None), column="knn"),
    ]


def run(out: Path, jobs: list[Job]) -> Folder:
    folder = Folder(out, jobs)
    with folders.hold(out, ABOUT) as lock:
        folder.check_unchanged()
        runner.run_jobs(folder, jobs, lock, MADE_BY)
    return folder


def ran(orders: Path) -> list[str]:
    lines = (orders / "runs").read_text().splitlines()
    (orders / "runs").unlink()
    return lines


def test_jobs_run_once(tmp_path: Path, orders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = make_jobs(tmp_path / "out", orders)
    folder = run(tmp_path / "out", jobs)
    assert ran(orders) == ["data", "run 5", "score"]
    record = folder.result(jobs[2])
    assert record is not None
    assert (record["result"], record["made_by"]) == ({"top1": 12.5}, {"cores": 2})
    said = capsys.readouterr().out
    assert "[1 of 3] seed-0/data: 00:00:00 gone, ETA unknown" in said
    assert "[3 of 3] seed-0/score: 00:00:0" in said
    assert "gone, ETA 00:00:0" in said
    assert "score knn: top-1 12.50 %" in said
    assert "a word before" not in said
    run(tmp_path / "out", jobs)
    assert not (orders / "runs").exists()


@pytest.mark.parametrize(("how", "status"), [("fail", "1"), ("die", "-9")])
def test_a_job_that_breaks_ends_the_run_and_the_next_run_goes_on(
    tmp_path: Path, orders: Path, how: str, status: str
) -> None:
    out, jobs = tmp_path / "out", make_jobs(tmp_path / "out", orders)
    (orders / "run").write_text(how)
    told = rf"seed-0/run failed with exit status {status}: `python -m stand_in run"
    with pytest.raises(UserError, match=told):
        run(out, jobs)
    assert ran(orders) == ["data", "run 5"]
    (orders / "run").unlink()
    run(out, jobs)
    assert ran(orders) == ["run 5", "score"]
    assert (out / "seed-0/run/half").exists()  # it goes on in its folder
    records = [Folder(out, jobs).record(job) for job in jobs]
    assert [record["went_on"] for record in records] == [False, True, False]


def test_pictures_are_written_anew_where_that_broke(tmp_path: Path, orders: Path) -> None:
    out, jobs = tmp_path / "out", make_jobs(tmp_path / "out", orders)
    (orders / "data").write_text("fail")
    with pytest.raises(UserError, match="seed-0/data failed"):
        run(out, jobs)
    assert (out / "seed-0/data/half").exists()
    (orders / "data").unlink()
    run(out, jobs)
    assert [path.name for path in (out / "seed-0/data").iterdir()] == ["proof"]


def test_a_changed_setting_is_noticed_before_anything_runs(tmp_path: Path, orders: Path) -> None:
    out, jobs = tmp_path / "out", make_jobs(tmp_path / "out", orders)
    (orders / "run").write_text("fail")
    with pytest.raises(UserError):
        run(out, jobs)
    ran(orders)
    with pytest.raises(
        UserError, match=r"run' was made by another command: 5 before, 6 now; give another --out"
    ):
        run(out, make_jobs(out, orders, length="6"))
    assert not (orders / "runs").exists()


def test_an_evaluation_is_bound_to_its_command_and_its_run(tmp_path: Path, orders: Path) -> None:
    out, jobs = tmp_path / "out", make_jobs(tmp_path / "out", orders)
    run(out, jobs)
    ran(orders)
    asked = [*jobs[:2], replace(jobs[2], words=(*jobs[2].words, "--k"))]
    run(out, asked)
    assert ran(orders) == ["score --k"]
    (out / "seed-0/run/proof").write_text("another run")
    folder = Folder(out, asked)
    assert [folder.result(job) is None for job in asked] == [False, True, True]
    record = out / "jobs/seed-0/data.json"
    record.write_text("{")
    assert folder.result(asked[0]) is None


def test_a_run_that_left_nothing_is_no_success(tmp_path: Path, orders: Path) -> None:
    out, jobs = tmp_path / "out", make_jobs(tmp_path / "out", orders)
    odd = [replace(jobs[0], proof=out / "elsewhere")]
    with pytest.raises(UserError, match=r"seed-0/data ended without an error and left no '.*else"):
        run(out, odd)


def test_somebody_elses_folder_is_left_alone(tmp_path: Path, orders: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    jobs = make_jobs(home, orders)
    for place in (home, home / "thesis.tex"):
        with pytest.raises(UserError, match="did not write"), folders.hold(place, ABOUT):
            pass
    (home / ".ablate").symlink_to(home / "thesis.tex")
    with pytest.raises(UserError, match="did not write"):
        run(home, jobs)
    assert {path.name for path in home.iterdir()} == {"thesis.tex", ".ablate"}
    assert (home / "thesis.tex").read_text() == "years"


def test_nothing_is_cleared_or_written_behind_a_link(tmp_path: Path, orders: Path) -> None:
    out, jobs = tmp_path / "out", make_jobs(tmp_path / "out", orders)
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "data/letter").touch()
    with folders.hold(out, ABOUT):
        (out / "seed-0").symlink_to(mine)
    with pytest.raises(UserError, match=r"seed-0' is a link"):
        run(out, jobs)
    assert (mine / "data/letter").exists()


def test_a_folder_is_of_one_table_at_one_scale(tmp_path: Path) -> None:
    with folders.hold(tmp_path / "out", ABOUT):
        pass
    other = {**ABOUT, "scale": "clipart", "reduced": True}
    with pytest.raises(
        UserError,
        match=r"holds the table models at scale digits, the table models at scale clipart, reduced",
    ):
        folders.check(tmp_path / "out", other)
    (tmp_path / "out/.ablate").write_text("{")
    with pytest.raises(UserError, match="another program's mark"):
        folders.check(tmp_path / "out", ABOUT)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with folders.hold(tmp_path / "out", ABOUT):
        second = folders.hold(tmp_path / "out", ABOUT)
        with pytest.raises(UserError, match="another run works in"), second:
            pass
    with folders.hold(tmp_path / "out", ABOUT):
        pass


@pytest.mark.slow
def test_a_command_that_outlives_its_runner_still_holds_the_folder(
    tmp_path: Path, orders: Path
) -> None:
    """The runner is killed at once; what it started goes on, and is waited for."""
    out = tmp_path / "out"
    (orders / "data").write_text("wait")
    code = (
        "import sys, pathlib; from tests.pipelines.ablate.test_runner import make_jobs, run; "
        "out, orders = map(pathlib.Path, sys.argv[1:]); run(out, make_jobs(out, orders))"
    )
    paths = os.pathsep.join([str(Path.cwd()), os.environ["PYTHONPATH"]])
    words = [sys.executable, "-c", code, str(out), str(orders)]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}) as process:
        _wait_for(out / "seed-0/data/half")
        (child,) = _children(process.pid)
        process.kill()
    try:
        second = folders.hold(out, ABOUT)
        with pytest.raises(UserError, match="or a command that it started"), second:
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def _wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(path)


def test_the_time_left_is_that_of_jobs_of_the_same_kind(tmp_path: Path, orders: Path) -> None:
    out, jobs = tmp_path / "out", make_jobs(tmp_path / "out", orders)
    folder = Folder(out, [*jobs, *(replace(job, name=f"{job.name}-2") for job in jobs)])
    with folders.hold(out, ABOUT):
        for job, seconds in zip(jobs, (100.0, 20.0, 3.0), strict=True):
            job.proof.parent.mkdir(parents=True, exist_ok=True)
            job.proof.touch()
            folder.finish(job, {"seconds": seconds})
    assert runner.told_eta(folder) == "ETA 00:02:03"
    # the seconds of a run that went on are not those of a whole one: the mean of the others
    folder.finish(jobs[0], {"seconds": 1.0, "went_on": True})
    assert runner.told_eta(folder) == "ETA 00:00:34"  # 11.5 + 20 + 3
    folder.finish(jobs[0], {"seconds": 100.0, "went_on": False})
    unlike = [replace(job, kind="other") for job in jobs[:2]]
    folder.jobs = [jobs[0], *(replace(job, name=f"{job.name}-3") for job in unlike)]
    folder._digests |= {job.name: "" for job in folder.jobs[1:]}
    assert runner.told_eta(folder) == "ETA 00:03:20"


def test_records_are_plain_json(tmp_path: Path, orders: Path) -> None:
    run(tmp_path / "out", make_jobs(tmp_path / "out", orders))
    record = json.loads((tmp_path / "out/jobs/seed-0/run.json").read_text())
    assert record["words"] == ["stand_in", "run", "OUT/seed-0/run", str(orders), "5"]
    assert set(record) == {
        "words", "digest", "proof", "seconds", "went_on", "made_by", "result"
    }  # fmt: skip
