"""In a training step the host waits for nothing that the device has just been given.

The whole command runs on a stand-in for a GPU (tests/stand_in_device.py), which counts what the
host waits for, and gives the numbers of a run on a CPU. The first step is left out: constants are
copied there once.
"""

from __future__ import annotations

import io
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState

from featcache.teachers.synthetic import Synthetic
from student import checkpoint
from student.training import accelerator, metrics, train
from tests import stand_in_device as stand_in
from tests import student_fixtures as fx
from tests.stand_in_device import DEVICE, Queue
from tests.student.targets import test_online_others as others
from tests.student.targets import test_second_teacher as second

STEPS = 6
LATE = 2  # steps until a row of metrics is looked at
# The host waits for these alone, and so many batches are queued behind each meanwhile, or steps: a
# row of metrics and the times in it; that a process is to stop; a flag that is raised for bad
# attention; batches, of which only so many may be on the device; and the copy of the last one on
# the host, whose memory is filled again.
STEPS_LATE = {"LateNumber.item": LATE, "Seconds.item": LATE, "StopNotice.due": LATE}
BATCHES_LATE = {"LateChecks.look": LATE, "Prefetcher._keep_close": LATE, "Prefetcher._host": 1}
ONLINE = ("--teacher", "online")


@dataclass
class Ran:
    """A run on the stand-in: what was counted before each step, and the rows that it wrote."""

    queue: Queue
    syncs: list[int] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    kernels: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    status: int = 0
    err: str = ""
    saved: list[int] = field(default_factory=list)  # steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_on_device(recipe: str, out: Path, *options: Any, sets: tuple[str, ...] = ()) -> Ran:
    """Train at a terminal; a checkpoint is not written."""
    plain_step, plain_accelerator = train.train_step, accelerator.accelerator

    def counted_step(*args: Any) -> Any:
        ran.syncs.append(len(queue.syncs))
        ran.waits.append(len(queue.waits))
        ran.kernels.append(queue.kernels)
        return plain_step(*args)

    def on_device(*args: Any) -> Accelerator:
        acc = plain_accelerator(*args)
        acc.state.device = PartialState().device = DEVICE
        return acc

    with pytest.MonkeyPatch.context() as patch, stand_in.installed() as queue:
        ran = Ran(queue)
        patch.setattr(train, "train_step", counted_step)
        patch.setattr(accelerator, "accelerator", on_device)
        patch.setattr(checkpoint, "save", lambda run, step, *more: ran.saved.append(step))
        patch.setattr(fx, "io", SimpleNamespace(StringIO=Terminal))
        command = fx.train(recipe, out, *given(recipe, options), sets=sets)
    ran.status, ran.err = command.status, command.err
    ran.rows = metrics.read(out)
    return ran


def given(recipe: str, options: tuple[Any, ...]) -> tuple[Any, ...]:
    cache = () if "--cache" in options else ("--cache", fx.cache_of(recipe))
    steps = ("--steps", STEPS, "--batch-size", 8, "--save-every", 99)
    return (*cache, "--images", fx.pictures(), *steps, *options)


def assert_nothing_is_waited_for(ran: Ran, batches: int = 1) -> None:
    """Between the beginnings of the second step and of the last, of some batches each."""
    assert ran.status == 0, ran.err
    assert ran.queue.syncs[ran.syncs[1] : ran.syncs[-1]] == []
    waits = ran.queue.waits[ran.waits[1] : ran.waits[-1]]
    late = {**BATCHES_LATE, **{who: steps * batches for who, steps in STEPS_LATE.items()}}
    batch = min(np.diff(ran.kernels)) / batches
    for who, behind in waits:
        assert behind > 0.9 * late[who] * batch, (who, behind, batch)
    seen, rows = Counter(who for who, _ in waits), STEPS - 1 - LATE
    checked = range(max(batches, LATE), batches * (STEPS - 1))  # batches with some before them
    assert seen.pop("LateChecks.look", 0) in (0, len(checked))
    assert seen == {
        "Prefetcher._keep_close": len(checked),
        "LateNumber.item": rows,
        "Seconds.item": rows * (1 + 2 * batches),  # the step; two waits for data a batch
        "Prefetcher._host": batches * (STEPS - 2),
    }


def same_numbers(ran: Ran, run: Path) -> bool:
    """Every part of every row, and the learning rate, as a CPU gave them."""
    rows, clocks = metrics.read(run), metrics.CLOCKS
    return len(rows) == STEPS and [
        {name: value for name, value in row.items() if name not in clocks} for row in rows
    ] == [{name: value for name, value in row.items() if name not in clocks} for row in ran.rows]


# --- the trainer ----------------------------------------------------------------------------------

CASES: list[tuple[str, tuple[str, ...], tuple[Any, ...]]] = [
    *((recipe, (), ()) for recipe in sorted(fx.RECIPES)),
    ("mralign", (), ("--accumulate", 2, "--batch-size", 4)),
    ("mralign", (), ONLINE),
    ("mralign", ("mask=stored",), ONLINE),
    ("mralign", ("mask=blockwise",), ONLINE),
    ("mrmae", ("mask=topk",), ONLINE),
    ("kd", (), ONLINE),
    ("maskalign", ("target_norm=bn",), ()),
    ("maskalign", ("target_norm=bn",), ONLINE),
]
MORE: list[tuple[str, tuple[str, ...], tuple[Any, ...]]] = [
    ("caev2", (), ("--ema", "0.9", "--checkpoint-activations")),
    ("mralign", (), ("--precision", "bf16")),
    ("mralign", (), ("--precision", "bf16", *ONLINE, "--accumulate", 2, "--batch-size", 4)),
    ("mae", ("mask=attentive",), ONLINE),
    (
        "mrmae",
        ("family=conv_vit", "encoder=tiny,depth=2,stage1=8,stage2=8,embed_dim=32,num_heads=2"),
        (),
    ),
    *((recipe, (), ONLINE) for recipe in sorted(fx.RECIPES.keys() - {"cae", "kd", "mralign"})),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sets", "options"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_no_step_waits_for_the_device(
    recipe: str, sets: tuple[str, ...], options: tuple[Any, ...], tmp_path: Path
) -> None:
    """And the numbers are those of a CPU, to the bit, with masks that were drawn from the teacher's
    attention on the device."""
    ran = run_on_device(recipe, tmp_path / "device", *options, sets=sets)
    assert_nothing_is_waited_for(ran, 2 if "--accumulate" in options else 1)
    fx.good(fx.train(recipe, tmp_path / "cpu", *given(recipe, options), sets=sets))
    assert same_numbers(ran, tmp_path / "cpu")


@pytest.mark.slow
def test_several_processes_reduce_once_and_stop_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of the loss in one vector, the wish to stop in another; the second process asks for
    it in the third step, and both know after the fifth."""
    reduced: list[tuple[int, ...]] = []

    def reduce(acc: Accelerator, values: torch.Tensor, how: str) -> torch.Tensor:
        reduced.append(tuple(values.shape))
        asked = how == "sum" and len(reduced) == 2 * 3
        return values + 1 if asked else values * 1

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda acc: 2))
    monkeypatch.setattr(Accelerator, "reduce", reduce)
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda acc: None)
    ran = run_on_device("mae", tmp_path / "run", "--batch-size", 4)
    assert (ran.status, ran.queue.syncs[ran.syncs[1] : ran.syncs[-1]]) == (75, [])
    assert "stopped after step 5 of 6" in ran.err
    assert reduced == [(2,), ()] * 5  # loss and pixel
    step = min(np.diff(ran.kernels))
    waits = [behind for who, behind in ran.queue.waits if who == "StopNotice.due"]
    assert len(waits) == 5 - LATE
    assert min(waits) > 0.9 * LATE * step


@pytest.mark.slow
def test_steps_that_may_be_left_out_are_asked_for(tmp_path: Path) -> None:
    """With --skip-nonfinite the host must know each loss before it makes the step."""
    ran = run_on_device("mae", tmp_path / "run", "--skip-nonfinite", 1)
    assert ran.status == 0
    asked = ran.queue.syncs[ran.syncs[1] : ran.syncs[-1]]
    assert asked == ["_local_scalar_dense"] * (STEPS - 2)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ONLINE])
def test_two_teachers(more: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--cache", second.both_path(), *more)
    ran = run_on_device("mrmae", tmp_path / "a", *options, sets=second.JOINT)
    assert_nothing_is_waited_for(ran)


@pytest.mark.slow
def test_a_tokenizer_in_the_loop(tmp_path: Path) -> None:
    options = ("--cache", others.folder() / "cache", *ONLINE)
    sets = (f"token_field={others.reds()}/token_ids", "vocabulary=64")
    ran = run_on_device("cae", tmp_path / "a", *options, sets=sets)
    assert_nothing_is_waited_for(ran)
    fx.good(fx.train("cae", tmp_path / "cpu", *given("cae", options), sets=sets))
    assert same_numbers(ran, tmp_path / "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["attentive", "stored", "uniform"])
def test_absent_shards(mask: str, tmp_path: Path) -> None:
    """Some of each batch come from the teacher in the loop, which runs beside the step."""
    cache = fx.extract(fx.pictures(), tmp_path / "c", "--rows-per-shard", "5")
    shutil.rmtree(cache / "shards" / "000001.zarr")
    options = ("--cache", cache, "--fallback", "online", "--fallback-limit", "0.25")
    sets = (f"mask={mask}",)
    ran = run_on_device("mralign", tmp_path / "device", *options, sets=sets)
    assert sum(row["fallback"] for row in ran.rows) == 10
    assert ran.queue.syncs[ran.syncs[1] : ran.syncs[-1]] == []
    fx.good(fx.train("mralign", tmp_path / "cpu", *given("mralign", options), sets=sets))
    assert same_numbers(ran, tmp_path / "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["attentive", "topk"])
def test_bad_attention_is_told_some_steps_later(
    mask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the line that a CPU gives at once, and before a checkpoint."""
    plain, calls = Synthetic.forward, [0]

    def forward(self: Synthetic, *args: Any) -> Any:
        ys, attention = plain(self, *args)
        calls[0] += 1
        bad = attention.clone()
        bad[2].fill_(0)
        return ys, bad if calls[0] == 3 else attention

    monkeypatch.setattr(Synthetic, "forward", forward)
    sets = (f"mask={mask}",)
    first = fx.train("mae", tmp_path / "cpu", *given("mae", ONLINE), sets=sets)
    assert calls == [3]
    # when the teacher has run for the fifth step, or when there is none left to do
    for steps, seen in ((STEPS, 5), (4, 4), (3, 3)):
        calls[0] = 0
        out = tmp_path / f"device-{steps}"
        ran = run_on_device("mae", out, *ONLINE, "--steps", steps, sets=sets)
        assert (ran.status, calls) == (1, [seen])
        assert first.line in ran.err
        assert ran.saved == []
    assert first.line == (
        "error: cannot take a mask from it: attention of row 2 runs from 0.0 to 0.0 (1 such rows "
        "of 8); allowed: finite weights >= 0, not all zero; run featcache verify on the cache, or "
        "train with mask=uniform"
    )


# --- a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "options"),
    [("cae", ()), *((r, o) for r in ("kd", "maskalign", "mralign") for o in ((), ONLINE))],
)
def test_cuda_itself_sees_no_wait(
    recipe: str, options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step to the last checkpoint torch raises an error at each call that waits for
    a stream; to wait for a mark is allowed."""
    step, save = train.train_step, train._save

    def strict(run: Any, loader: Any, state: Any, feed: Any, number: int, total: int) -> Any:
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        return step(run, loader, state, feed, number, total)

    def relaxed(*args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        save(*args)

    monkeypatch.setattr(train, "train_step", strict)
    monkeypatch.setattr(train, "_save", relaxed)
    try:
        gpu = ("--device", "cuda", *options)
        fx.good(fx.train(recipe, tmp_path / "run", *given(recipe, gpu)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(metrics.read(tmp_path / "run")) == STEPS
