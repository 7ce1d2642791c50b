"""Peak memory and speed are measured by batch, with and without activation checkpointing."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from benchmarks import training_steps as steps
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps import settings
from benchmarks.memory_monitor import MemoryMonitor
from student.training import train


def memory(bench: Bench, recipe: str = "maskalign", teacher: str = "clip-b16") -> None:
    """Give both students at growing batches; a batch that does not fit is a row that says so."""
    for student in ("base", "large"):
        for checkpointed in (False, True):
            for batch_size in bench.sizes.memory_batches:
                if not _one(bench, recipe, teacher, student, checkpointed, batch_size):
                    break  # larger ones do not fit either


def _one(
    bench: Bench, recipe: str, teacher: str, student: str, checkpointed: bool, batch_size: int
) -> bool:
    """Give one row; return whether the batch fitted."""
    how = ", checkpointed activations" if checkpointed else ""
    label = f"{student}, batch {batch_size:,}{how}"
    options = ("--checkpoint-activations",) if checkpointed else ()
    sets = (f"encoder={bench.sizes.students[student]}", *settings(bench, recipe))
    config = bench.config(compiled=False, sets=sets, train_options=options)
    try:
        peak, seconds = _measure(bench, config, recipe, teacher, batch_size)
    except torch.OutOfMemoryError:
        bench.row(label, None, note="out of memory")
        return False
    finally:
        bench.forget()
    rate = batch_size / seconds
    bench.row(label, peak / 2**30, "GiB", note=f"{rate:,.0f} images/s", facts={"rate": rate})
    return True


def _measure(
    bench: Bench, config: steps.StepConfig, recipe: str, teacher: str, batch_size: int
) -> tuple[float, float]:
    """Return the peak bytes and the seconds of a step on one batch in memory."""
    with ExitStack() as stack:
        run, loader, acc = steps.build(config, recipe, bench.cache(teacher))
        state = train.build_state(run, loader, acc)
        feed = steps.make_feed(run, loader, state, acc, stack)
        batch = repeated(feed.take().batch, batch_size)
        made = steps.make_step(run, loader, state, steps.BatchesInMemory([batch]))
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with MemoryMonitor() as host:
            steps.seconds_of(made, 1, bench.device)
            seconds = steps.seconds_of(made, max(bench.sizes.steps // 5, 1), bench.device)
    peak = torch.cuda.max_memory_allocated() if bench.on_gpu else host.peak_bytes
    return float(peak), seconds


def repeated(batch: dict[str, torch.Tensor], batch_size: int) -> dict[str, Any]:
    """Return a batch of `batch_size` samples made of those of another one."""
    out = {}
    for name, values in batch.items():
        rows = torch.arange(batch_size, device=values.device) % len(values)
        out[name] = values[rows]
    return out
