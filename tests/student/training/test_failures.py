"""A failure in the middle of a run gives one line and the right exit status, leaves the last
checkpoint intact, and the same command with --resume goes on to the undisturbed end.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import student.training.train
from featcache.views import pixel_path
from student import checkpoint
from student.training import accelerator, metrics
from tests import processes
from tests import student_fixtures as fx
from tests.test_end_to_end import assert_undisturbed

OPTIONS = ("--steps", "9", "--batch-size", "4", "--save-every", "2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("failures") / "whole"
    fx.good(fx.train("maskalign", run, "--cache", fx.cache_path(), *OPTIONS))
    return run


def train(run: Path, *options: Any, cache: Path | None = None) -> fx.Ran:
    return fx.train("maskalign", run, "--cache", cache or fx.cache_path(), *OPTIONS, *options)


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something after the gradients of a step (counted from 0) and before its update."""
    plain = student.training.train._gradients

    def acting(*args: Any) -> Any:
        out = plain(*args)
        if args[-1] == step:
            act()
        return out

    monkeypatch.setattr(student.training.train, "_gradients", acting)


def too_large() -> None:
    """Make torch itself ask for more than the host has: 4 EiB."""
    torch.empty(1 << 60)


def on_gpu() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.34 GiB. GPU 0 has a total capacity of 23.50 GiB "
        "of which 1.20 GiB is free. Including non-PyTorch memory, this process has 22.29 GiB "
        "memory in use. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF."
    )


def of_python() -> None:
    raise MemoryError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (
            on_gpu,
            (
                "out of GPU memory",
                "Tried to allocate 2.34 GiB",
                "--checkpoint-activations",
                "--precision bf16",
            ),
        ),
        (too_large, ("out of host memory", "--workers")),
        (of_python, ("out of host memory", "--workers")),
    ],
)
def test_out_of_memory_in_a_step(
    fails: Callable[[], None],
    told: tuple[str, ...],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        in_step(patch, 5, fails)
        ran = train(run)
    assert ran.status == 1
    for part in (*told, "--batch-size 4", "--accumulate"):
        assert part in ran.line
    assert (
        "note: the checkpoint of step 4 is kept; the same command with --resume goes on" in ran.err
    )
    assert len(ran.line) < 400
    assert checkpoint.latest_step(run) == 4
    fx.good(train(run, "--resume"))
    assert_undisturbed(run, whole)


def test_out_of_memory_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_step(patch, 0, on_gpu)
        ran = train(tmp_path / "run")
    assert (ran.status, "is kept" in ran.err) == (1, False)
    assert not (tmp_path / "run").exists()
    fx.good(train(tmp_path / "run"))


def test_out_of_memory_in_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_step(monkeypatch, 1, on_gpu)
    ran = train(tmp_path / "run", "--dry-run")
    assert (ran.status, "out of GPU memory" in ran.line) == (1, True)
    assert not (tmp_path / "run").exists()


def test_out_of_memory_while_a_picture_is_decoded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread of the loader."""
    calls: list[int] = []
    plain = pixel_path.decode

    def decode(data: bytes) -> Any:
        calls.append(1)
        if len(calls) == 30:
            raise MemoryError
        return plain(data)

    with monkeypatch.context() as patch:
        patch.setattr(pixel_path, "decode", decode)
        ran = train(tmp_path / "run")
    assert (ran.status, "out of host memory" in ran.line) == (1, True)
    fx.good(train(tmp_path / "run", "--resume"))
    assert_undisturbed(tmp_path / "run", whole)


def test_another_runtime_error_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours must not look like a lack of memory."""

    def defect() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    in_step(monkeypatch, 1, defect)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(tmp_path / "run")


@pytest.mark.slow
def test_one_process_of_two_runs_out_of_memory(tmp_path: Path) -> None:
    """It says so, and the other one does not wait for it for ever: the launcher ends it, here the
    lost connection."""
    failing = """
import torch, student.training.train
plain = student.training.train._gradients
def fails(*args):
    if RANK == 1 and args[-1] == 5:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.34 GiB. GPU 0 ...")
    return plain(*args)
student.training.train._gradients = fails
"""
    options = ("--cache", fx.cache_path(), "--steps", 9, "--batch-size", 4, "--save-every", 2)
    ran = processes.train(
        2, *options, "--out", tmp_path / "run", recipe="maskalign", before=failing
    )
    assert ran.status[1] == 1
    assert ran.status[0] not in (0, None)
    assert ran.said[1].count("error: out of GPU memory") == 1
    assert "Traceback" not in ran.said[1]
    assert checkpoint.latest_step(tmp_path / "run") == 4
    processes.good(
        processes.train(2, *options, "--out", tmp_path / "run", "--resume", recipe="maskalign")
    )
    processes.good(processes.train(2, *options, "--out", tmp_path / "whole", recipe="maskalign"))
    assert_undisturbed(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_the_cache_is_deleted_under_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 shards of one row each, two a step: those that nothing has opened yet are gone."""
    pictures = fx.save_pictures(tmp_path / "pictures", 48)
    cache = fx.extract(pictures, tmp_path / "cache", "--rows-per-shard", "1")
    shutil.copytree(cache, tmp_path / "copy")
    options = (
        "--cache",
        cache,
        "--images",
        pictures,
        "--batch-size",
        "2",
        "--steps",
        "24",
        "--save-every",
        "2",
    )
    fx.good(fx.train("maskalign", tmp_path / "whole", *options))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        in_step(patch, 2, lambda: shutil.rmtree(cache))
        ran = fx.train("maskalign", run, *options)
    assert ran.status == 1
    assert str(cache) in ran.line
    assert "No such file or directory" in ran.line
    step = checkpoint.latest_step(run)
    assert step is not None
    assert 2 <= step < 24
    assert (
        f"note: the checkpoint of step {step} is kept; the same command with --resume goes on "
        "from there" in ran.err
    )
    shutil.move(tmp_path / "copy", cache)
    fx.good(fx.train("maskalign", run, *options, "--resume"))
    assert_undisturbed(run, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_row_that_cannot_be_read(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, or a network disk that went away, in the middle of a run."""
    cache = Path(shutil.copytree(fx.cache_path(), tmp_path / "cache"))
    plain, bad = os.preadv, list[int]()

    def preadv(fd: int, *rest: Any) -> int:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if "/features/" in path and metrics.read(tmp_path / "run")[4:]:
            bad.append(fd)
            raise OSError(number, os.strerror(number), path)
        return plain(fd, *rest)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        ran = train(run, cache=cache)
    assert bad
    assert ran.status == 1
    assert "/features/" in ran.line
    assert (checkpoint.latest_step(run) or 0) >= 4
    fx.good(train(run, "--resume", cache=cache))
    assert_undisturbed(run, whole)


def test_a_picture_that_cannot_be_read(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = Path(shutil.copytree(fx.pictures(), tmp_path / "pictures"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        in_step(patch, 1, lambda: (pictures / f"{unread(pictures)}.png").unlink())
        ran = train(run, "--images", pictures)
    assert ran.status == 1
    assert "cannot be used in training" in ran.line
    lost = ran.line.split("picture '")[1].split("'")[0]
    shutil.copy(fx.pictures() / f"{lost}.png", pictures)
    fx.good(train(run, "--images", pictures, "--resume"))
    assert_undisturbed(run, whole)


def unread(pictures: Path) -> str:
    """The key of a picture of the first epoch's last step, which no batch that is under way
    shows."""
    from featcache import rng

    order = rng.permutation(24, 0, 0)
    return sorted(path.stem for path in pictures.iterdir())[int(order[-1])]


def test_a_full_disk_at_a_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save = torch.save

    def full(state: Any, file: Any) -> None:
        if state["step"] == 6:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        ran = train(run)
    assert (ran.status, "No space left on device" in ran.line) == (1, True)
    assert [
        path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")
    ] == []
    assert checkpoint.latest_step(run) == 4
    fx.good(train(run, "--resume"))
    assert_undisturbed(run, whole)


def test_precisions_that_the_gpu_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of before 2020, as torch tells of it: bf16 would be emulated, slowly."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla V100")
    from featcache.errors import UsageError

    with pytest.raises(
        UsageError, match=r"--precision bf16 .* Tesla V100; fp32 and fp16 are allowed"
    ):
        accelerator.accelerator("bf16")
