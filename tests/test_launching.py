"""The page on launching: each line of a launcher is one that the launcher itself takes, and what a
machine without a GPU can do is done as the page says it."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from torch.distributed import run as torchrun

from featcache.errors import UsageError
from student.training import launch_variables, metrics
from tests import processes
from tests import student_fixtures as fx
from tests.conftest import _SERVER
from tests.student.training.test_fsdp import ROOT, VARIABLES
from tests.test_end_to_end import assert_undisturbed

PAGE = (ROOT / "docs/guides/launching.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def lines(text: str) -> Iterator[str]:
    """Every line of a page that calls a launcher, in blocks and in sentences."""
    blocks = "".join(re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ")
    sentences = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for line in (*blocks.splitlines(), *re.findall(r"`([^`\n]*)`", sentences)):
        # with its program: `torchrun ...` alone stands for any
        if re.match(r"(torchrun|accelerate launch) .*-m student ", line):
            yield line


LINES = sorted({line for page in PAGES for line in lines(page.read_text())})


def parse(line: str) -> Any:
    """What the launcher's own parser makes of a line."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        args = torchrun.get_args_parser().parse_args(words[1:])
        torchrun.config_from_args(args)  # its values as well
        return args
    args = launch.launch_command_parser().parse_args(words[2:])
    return launch._validate_launch_command(args)[0]


@pytest.mark.parametrize("line", LINES)
def test_a_launcher_takes_its_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # a configuration is named from there
    args = parse(line)
    assert args.training_script == "student"
    assert args.training_script_args[0] in ("train", "eval")


def test_lines_are_found_and_wrong_ones_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(LINES) >= 10
    for line in ("torchrun --nodes 2 -m student train", "torchrun --nnodes two -m student train"):
        with pytest.raises((SystemExit, ValueError)):
            parse(line)
    capsys.readouterr()


def test_two_machines_are_told_apart_and_count_all_processes() -> None:
    """Of Accelerate's two lines; torchrun's is the same on both."""
    two = [parse(line) for line in LINES if "--num_machines 2" in line]
    assert sorted(args.machine_rank for args in two) == [0, 1]
    assert {(args.num_machines, args.num_processes) for args in two} == {(2, 16)}
    assert {(args.main_process_ip, args.main_process_port) for args in two} == {("node1", 29500)}


def test_the_table_of_batches_is_one_global_batch() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", PAGE, re.M)
    assert len(rows) == 4
    for processes_, size, accumulate, total in rows:
        assert int(processes_) * int(size) * int(accumulate) == int(total.replace(",", "")) == 1024


def test_fsdp_without_gpus_is_refused_in_one_line() -> None:
    """What each process of the page's line is told where Accelerate shards nothing."""
    with pytest.raises(UsageError, match="asks for FSDP, which several processes on GPUs can have"):
        launch_variables.check_processes(VARIABLES, 2, sharded=False)


@pytest.mark.slow
def test_a_batch_that_six_processes_cannot_share(
    tmp_path: Path,
) -> None:
    """A run of 8 pictures a step on 3 processes: nothing is begun, and the line says what to do."""
    run, options = tmp_path / "run", ("--cache", fx.cache_path(), "--steps")
    fx.good(fx.train("mralign", run, *map(str, options), "2", "--batch-size", "8"))
    ran = processes.train(3, *options, 4, "--out", run, "--resume", recipe="mralign")
    assert ran.status == [2, 2, 2]
    assert "which 3 processes x --accumulate 1 cannot share evenly" in ran.said[0]
    assert len(metrics.read(run)) == 2


@pytest.mark.slow
def test_two_shells_of_one_machine(tmp_path: Path) -> None:
    """The page's two lines, each by a torchrun of its own: the run of two processes."""
    first, second = [line for line in lines(PAGE) if "--rdzv_endpoint localhost:29500" in line]
    assert first == second
    run, whole = tmp_path / "run", tmp_path / "whole"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(first.replace("29500", str(port)))[1:]
    words = [{"CACHE": str(fx.cache_path()), "RUN": str(run)}.get(word, word) for word in words]
    options = ["--batch-size", "4", "--steps", "4"]
    words += [*options, *(part for text in fx.RECIPES["mralign"] for part in ("--set", text))]
    shells = [_SERVER.Process(target=shell, args=(words, tmp_path / str(i))) for i in range(2)]
    for each in shells:
        each.start()
    for each in shells:
        each.join(240)
    said = [(tmp_path / str(i)).read_text() for i in range(2)]
    assert [each.exitcode for each in shells] == [0, 0], said
    assert sum("2 processes on 2 machines" in text for text in said) == 1
    ran = processes.train(2, "--cache", fx.cache_path(), *options, "--out", whole, recipe="mralign")
    processes.good(ran)
    assert_undisturbed(run, whole)


def shell(words: list[str], log: Path) -> None:
    """torchrun in a process of its own, which has imported it."""
    import os

    fd = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update(fx.environment(), CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    torchrun.main(words)
