"""A training step is timed in all its variants, which take turns on the device:

    cached     the trainer's loader, reads, checks and stored pixels
    in memory  batches that lie on the device already
    online     the teacher in the step
    plain      PyTorch and timm alone, eager, on batches in memory
    released   MaskAlign as its released code makes a step: the teacher in it, eager

Our variants share one model and its optimizer, so that it is compiled once.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain_steps, released_step
from benchmarks import training_steps as steps
from benchmarks.gpu.bench import Bench
from featcache.errors import UserError, one_line
from student import recipes
from student.training import train

WARM_STEPS = 3  # kernels are chosen, memory is touched, code is compiled
CACHED_AIM, PLAIN_AIM, RELEASED_AIM = 1.03, 1.5, 3.0


def step(
    bench: Bench,
    recipe: str,
    teacher: str,
    student: str,
    by_gmac: float | None = None,
    compiled: bool = True,
) -> None:
    """Give images a second and the ratios of all variants."""
    sizes = bench.sizes
    compiled = compiled and sizes.compiled
    sets = (f"encoder={sizes.students[student]}", *settings(bench, recipe))
    config = bench.config(compiled=compiled, sets=sets)
    with ExitStack() as stack:
        variants, batch = _ours(config, recipe, bench.cache(teacher), stack)
        for name, made in _others(bench, recipe, teacher, student, batch).items():
            if isinstance(made, str):
                bench.row(f"{name} step", None, note=made)
            else:
                variants[name] = made
        for name, made in variants.items():
            seconds = steps.seconds_of(made, WARM_STEPS, bench.device)
            print(f"{name}: {WARM_STEPS} first steps of {seconds:.3f} s", flush=True)
        found = steps.in_turns(variants, sizes.reps, sizes.steps, bench.device, sizes.settle)
    _rows(bench, found, config.batch_size, by_gmac)


def settings(bench: Bench, recipe: str) -> tuple[str, ...]:
    """Return the trial's settings that this recipe has."""
    known = recipes.load(recipe).Config.__dataclass_fields__
    return tuple(text for text in bench.sizes.settings if text.partition("=")[0] in known)


def _ours(
    config: steps.StepConfig, recipe: str, cache: Path, stack: ExitStack
) -> tuple[dict[str, steps.Step], dict[str, torch.Tensor]]:
    """Return our variants, and a batch that lies on the device."""
    run, loader, acc = steps.build(config, recipe, cache)
    state = train.build_state(run, loader, acc)
    feed = steps.make_feed(run, loader, state, acc, stack)
    batches = [feed.take().batch for _ in range(2)]
    found = {
        "cached": steps.make_step(run, loader, state, feed),
        "in memory": steps.make_step(run, loader, state, steps.BatchesInMemory(batches)),
    }
    if recipes.load(recipe).needs(run.config).fields:
        run, loader, acc = steps.build(config, recipe, cache, online=True)
        feed = steps.make_feed(run, loader, state, acc, stack)
        found["online"] = steps.make_step(run, loader, state, feed)
    return found, batches[0]


def _others(
    bench: Bench, recipe: str, teacher: str, student: str, batch: dict[str, torch.Tensor]
) -> dict[str, steps.Step | str]:
    """Return what ours are compared with, or why it is not there."""
    device, precision = torch.device(bench.device), bench.sizes.precision
    precision = "no" if precision == "fp32" else precision
    others = bench.sizes.others
    found: dict[str, steps.Step | str] = {}
    if recipe in plain_steps.MODELS:
        found["plain"] = plain_steps.make_step(
            recipe, batch, device, precision, encoder=others[student]
        )
    if recipe == "maskalign":
        try:
            found["released"] = released_step.make_step(
                others[teacher], others[student], batch["images"], device, precision
            )
        except UserError as error:  # without transformers
            found["released"] = one_line(str(error))
    return found


def _rows(
    bench: Bench, found: dict[str, list[float]], batch_size: int, by_gmac: float | None
) -> None:
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    facts = {
        "ms": {name: 1000 * seconds for name, seconds in medians.items()},
        "fastest_ms": {name: 1000 * min(seconds) for name, seconds in found.items()},
        "slowest_ms": {name: 1000 * max(seconds) for name, seconds in found.items()},
    }
    bench.row("cached", batch_size / medians["cached"], "images/s", facts=facts)
    goals: dict[tuple[str, str], dict[str, Any]] = {
        ("cached", "in memory"): {"at_most": CACHED_AIM},
        ("online", "cached"): {"at_least": by_gmac},
        ("plain", "in memory"): {"at_least": PLAIN_AIM},
        ("released", "cached"): {"at_least": RELEASED_AIM},
    }
    for (over, under), goal in goals.items():
        value = steps.ratio(found, over, under)
        if value is not None:
            bench.row(f"{over} / {under}", value, **goal)


def recipe_rates(bench: Bench, teacher: str = "clip-b16") -> None:
    """Give images a second of every recipe that the cache serves, on batches in memory."""
    cache = bench.token_cache(teacher)
    for recipe in recipes.names():
        sets = (_encoder(bench, recipe), *settings(bench, recipe))
        config = bench.config(compiled=False, sets=sets)
        try:
            with ExitStack() as stack:
                run, loader, acc = steps.build(config, recipe, cache)
                state = train.build_state(run, loader, acc)
                feed = steps.make_feed(run, loader, state, acc, stack)
                memory = steps.BatchesInMemory([feed.take().batch])
                made = steps.make_step(run, loader, state, memory)
                steps.seconds_of(made, WARM_STEPS, bench.device)
                found = steps.in_turns(
                    {recipe: made}, bench.sizes.reps, bench.sizes.steps, bench.device
                )
        except (UserError, torch.OutOfMemoryError) as error:  # such as token ids it lacks
            bench.row(recipe, None, note=one_line(str(error)))
            bench.forget()
            continue
        bench.row(recipe, config.batch_size / statistics.median(found[recipe]), "images/s")
        del run, loader, state, feed, memory, made
        bench.forget()


def _encoder(bench: Bench, recipe: str) -> str:
    default = recipes.load(recipe).Config.__dataclass_fields__["encoder"].default
    return (
        f"encoder={bench.sizes.students['base']}" if bench.sizes.settings else f"encoder={default}"
    )
