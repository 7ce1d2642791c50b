"""`student` in several processes over gloo, forked from a server that has imported
everything: about a second a run, where a launcher that imports torch in each process takes ten.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import student_fixtures as fx
from tests.conftest import _SERVER


@dataclass(frozen=True)
class Several:
    """Exit statuses and output of the processes, in order of rank, are kept."""

    status: list[int | None]
    said: list[str]


def train(
    world: int, *args: Any, recipe: str = "", sets: Sequence[str] = (), before: str = ""
) -> Several:
    """`student train ARGS` in `world` processes; each runs the Python text `before` first. A
    recipe's small settings are added where one is named."""
    words = ["train", "--device", "cpu", *args]
    if recipe:
        words += [
            "--recipe",
            recipe,
            *(part for text in (*fx.RECIPES[recipe], *sets) for part in ("--set", text)),
        ]
    return student(world, words, before)


def student(world: int, args: Sequence[Any], before: str = "") -> Several:
    """`student ARGS` in `world` processes; each runs the Python text `before` first."""
    words = [str(word) for word in args]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(world)]
        started = [
            _SERVER.Process(
                target=_run,
                args=(words, rank, world, port, fx.environment(), str(logs[rank]), before),
            )
            for rank in range(world)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
        for process in started:
            if process.exitcode is None:
                process.kill()
        return Several([process.exitcode for process in started], [log.read_text() for log in logs])


def good(ran: Several) -> Several:
    assert set(ran.status) == {0}, ran.said
    return ran


def _run(
    args: list[str],
    rank: int,
    world: int,
    port: int,
    environment: dict[str, str],
    log: str,
    before: str,
) -> None:
    os.environ.update(environment)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    sys.argv = ["student", *args]
    exec(before, {"RANK": rank})
    from student.cli import main

    try:
        main()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
