"""Waiting for data is measured at full speed: how long a step waits, how many bytes a second it
wants, and what the loader gives where no step holds it back."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, closing
from itertools import islice
from typing import Any

from benchmarks import training_steps as steps
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps import WARM_STEPS, settings
from student.training import train

WAIT_AIM = 0.05  # of a step


def data(bench: Bench, recipe: str = "maskalign", teacher: str = "clip-b16") -> None:
    """Give both ways to the pixels, from the same cache: stored with the targets, and decoded from
    tars."""
    sets = (f"encoder={bench.sizes.students['base']}", *settings(bench, recipe))
    stored = bench.config(sets=sets)
    tars = bench.config(sets=sets, pictures=bench.tars(), train_options=("--decode",))
    for name, config in (("stored pixels", stored), ("tars", tars)):
        _one(bench, name, config, recipe, teacher)


def _one(bench: Bench, name: str, config: steps.StepConfig, recipe: str, teacher: str) -> None:
    sizes = bench.sizes
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        run, loader, acc = steps.build(config, recipe, bench.cache(teacher))
        state = train.build_state(run, loader, acc)
        feed = steps.make_feed(run, loader, state, acc, stack)
        batch = feed.take().batch
        memory = steps.make_step(run, loader, state, steps.BatchesInMemory([batch]))
        steps.seconds_of(memory, WARM_STEPS, bench.device)
        full_s = steps.seconds_of(memory, sizes.steps, bench.device)
        cached = steps.make_step(run, loader, state, feed, rows.append)
        count = sizes.settle + sizes.steps * sizes.reps
        steps.seconds_of(cached, count, bench.device)
        waits = [row["data_wait"].item() for row in rows[sizes.settle :]]
    wanted = sample_bytes(loader) * config.batch_size / full_s
    given = loader_rate(loader, count) * sample_bytes(loader)
    bench.row(f"{name}: waiting", statistics.mean(waits), "of a step", at_most=WAIT_AIM)
    note = f"{sample_bytes(loader):,} bytes a sample"
    bench.row(f"{name}: wanted at full speed", wanted / 1e9, "GB/s", note=note)
    bench.row(f"{name}: the loader alone / wanted", given / wanted, at_least=1.0)


def sample_bytes(loader: Any) -> int:
    """Return the bytes of one sample that go to the device."""
    layout = loader.targets.layout()
    total = 0
    for shape, dtype in layout.values():
        size = dtype.itemsize
        for length in shape:
            size *= length
        total += size
    return total


def loader_rate(loader: Any, batches: int) -> float:
    """Return samples a second of the loader, its first batches left out: they were made before
    anybody asked."""
    with closing(loader.iterate(0, steps.ENDLESS)) as hosts:
        for _ in islice(hosts, 4):
            pass
        start = time.perf_counter()
        for _ in islice(hosts, batches):
            pass
        return batches * loader.batch_size / (time.perf_counter() - start)
