"""Codecs are measured where the levels are: decoding a batch beside the step that waits for it, and
encoding beside the teacher whose levels they are."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from benchmarks import training_steps as steps
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps import WARM_STEPS, settings
from featcache import teachers
from featcache.extraction.forward import run_teacher
from featcache.models import precision
from featcache.targets.codec_names import LOSSLESS, NAMES
from featcache.targets.codecs import CODECS
from student.training import train

KEPT = 59  # [CLS] and the patches that a MaskAlign student sees of 196
CALLS = 5


def codecs(bench: Bench, recipe: str = "maskalign", teacher: str = "clip-b16") -> None:
    """Give, for each codec, the share of the step that decoding a batch takes, and of the teacher's
    forward that encoding what is kept of it takes."""
    step_s, levels, width = _step(bench, recipe, teacher)
    forward_s = _forward(bench, teacher)
    count = bench.sizes.batch_size
    bench.row("student's step in memory", count / step_s, "images/s")
    bench.row("teacher's forward", count / forward_s, "images/s")
    h = torch.randn(count, levels, KEPT, width, device=bench.device).half()
    for name in NAMES:
        if name == LOSSLESS:
            continue
        codec = CODECS[name]
        state = {
            key: values.to(bench.device) for key, values in codec.prepare(iter(h[:16]), 0).items()
        }
        coded = codec.encode(h, state)
        calls = {
            "decoding / step": (lambda: codec.decode(coded, state), step_s),  # noqa: B023
            "encoding / forward": (lambda: codec.encode(h, state), forward_s),  # noqa: B023
        }
        for what, (call, whole_s) in calls.items():
            steps.seconds_of(call, 1, bench.device)
            seconds = min(steps.seconds_of(call, 1, bench.device) for _ in range(CALLS))
            note = f"{count / seconds:,.0f} views/s"
            bench.row(f"{name}: {what}", seconds / whole_s, note=note)


def _step(bench: Bench, recipe: str, teacher: str) -> tuple[float, int, int]:
    """Return the seconds of a step in memory, and the levels and width of its teacher."""
    sets = (f"encoder={bench.sizes.students['base']}", *settings(bench, recipe))
    config = bench.config(sets=sets)
    with ExitStack() as stack:
        run, loader, acc = steps.build(config, recipe, bench.cache(teacher))
        state = train.build_state(run, loader, acc)
        batch = steps.make_feed(run, loader, state, acc, stack).take().batch
        made = steps.make_step(run, loader, state, steps.BatchesInMemory([batch]))
        steps.seconds_of(made, WARM_STEPS, bench.device)
        seconds = steps.seconds_of(made, bench.sizes.steps, bench.device)
        features = batch["features"]
    return seconds, features.shape[1], features.shape[-1]


def _forward(bench: Bench, name: str) -> float:
    """Return the seconds of the teacher's forward on a batch."""
    teacher = teachers.load(bench.sizes.teachers[name], "random:0", bench.device)
    precision.configure(teacher, bench.sizes.precision if bench.on_gpu else "fp32")
    px, count = teacher.input_px, bench.sizes.batch_size
    pixels = torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8, device=bench.device)
    call = lambda: run_teacher(teacher, pixels, [teacher.depth])  # noqa: E731 - one expression
    steps.seconds_of(call, 2, bench.device)
    return min(steps.seconds_of(call, 1, bench.device) for _ in range(CALLS))
