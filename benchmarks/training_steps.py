"""The trainer's own step is built for a clock: on a cache, on batches in memory, with the teacher
in the loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import featcache.cli
from featcache.runtime.device_clock import Seconds
from student import recipes
from student.commands import train as train_command
from student.data.prefetch import PrefetchedBatch, Prefetcher
from student.setup.build import build_run
from student.setup.options import Options
from student.training import accelerator, train
from student.training.train_state import TrainState

SCALE = "0.2,1"  # of the crops
ENDLESS = 1 << 40  # steps of a run whose learning rate hardly moves

Step = Callable[[], None]


@dataclass(frozen=True)
class StepConfig:
    """The options that all variants of all recipes share."""

    pictures: Path | str
    batch_size: int
    device: str
    precision: str = "auto"
    compiled: bool = False
    workers: int = 2
    levels: str = "last:5"  # that are extracted
    sets: tuple[str, ...] = ()  # settings of the recipe
    extract_options: tuple[str, ...] = ()
    train_options: tuple[str, ...] = ()


class BatchesInMemory:
    """Gives the same batches on the device again and again, as a Prefetcher gives new ones."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self._batches = cycle(batches)

    def take(self) -> PrefetchedBatch:
        return PrefetchedBatch(next(self._batches), [], Seconds())

    def bring(self) -> None:
        """They are there already."""


def extract(config: StepConfig, teacher: str, out: Path) -> Path:
    """Extract a cache of one view with random weights, by the command."""
    weights = () if teacher.startswith("synthetic") else ("--weights", "random:0")
    options = {
        "--teacher": teacher,
        "--images": config.pictures,
        "--out": out,
        "--views": 1,
        "--levels": config.levels,
        "--scale": SCALE,
        "--device": config.device,
        "--batch-size": min(config.batch_size, 64),
    }
    args = ["extract", *_arguments(options), *weights, *config.extract_options]
    featcache.cli.cli.main(args, standalone_mode=False)
    return out


def _arguments(options: dict[str, Any]) -> list[str]:
    return [str(part) for option in options.items() for part in option]


def build(
    config: StepConfig, recipe: str, cache: Path, online: bool = False
) -> tuple[Any, Any, Accelerator]:
    """Build run, loader and accelerator as `student train` does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {
        "--recipe": recipe,
        "--cache": cache,
        "--images": config.pictures,
        "--steps": 1_000_000,
        "--batch-size": config.batch_size,
        "--workers": config.workers,
        "--out": cache / "never",
        "--precision": config.precision,
        "--device": config.device,
        "--scale": SCALE,  # all views, whatever crops the recipe was published with
    }
    args = [*_arguments(options), *config.train_options]
    args += ["--compile"] if config.compiled else []
    args += ["--teacher", "online"] if online else []
    args += [part for text in config.sets for part in ("--set", text)]
    given = train_command.command.make_context("train", args).params
    names = {field.name for field in fields(Options)} - {"file_settings"}  # of --config
    rest = {name: given[name] for name in names}
    acc = accelerator.accelerator(config.precision, config.device)
    run, loader = build_run(recipe, recipes.load(recipe), acc, Options(**rest), lambda line: None)
    return run, loader, acc


def has_teacher(config: StepConfig, recipe: str, cache: Path) -> bool:
    """Return whether a recipe reads anything of a teacher."""
    return bool(recipes.load(recipe).needs(build(config, recipe, cache)[0].config).fields)


def make_feed(run: Any, loader: Any, state: TrainState, acc: Accelerator, stack: ExitStack) -> Any:
    """Return a Prefetcher of a run's batches, which ends with the stack."""
    hosts: Iterator[Any] = stack.enter_context(
        closing(loader.iterate(1, ENDLESS, state.drop_rates))
    )
    return Prefetcher(run.config, run.targets, hosts, acc.device, run.seed)


def make_step(
    run: Any, loader: Any, state: TrainState, feed: Any, seen: Callable[[Any], None] | None = None
) -> Step:
    """Return the trainer's own step, of a run so long that its learning rate hardly moves; `seen`
    is given its row of metrics."""
    numbers = iter(range(1, ENDLESS))

    def step() -> None:
        result = train.train_step(run, loader, state, feed, next(numbers), ENDLESS)
        if seen is not None:
            seen(result.row)

    return step


def seconds_of(step: Step, count: int, device: str) -> float:
    """Return the seconds of one step, all work on the device done."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return (time.perf_counter() - start) / count


def wait(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def in_turns(
    variants: dict[str, Step], reps: int, count: int, device: str, settle: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of a step, by variant and repetition: another variant begins each
    repetition, and its first `settle` steps are not timed."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    names = [*variants]
    for rep in range(reps):
        first = rep % len(names)
        for name in [*names[first:], *names[:first]]:
            for _ in range(settle):
                variants[name]()
            found[name].append(seconds_of(variants[name], count, device))
    return found


def ratio(found: dict[str, list[float]], over: str, under: str) -> float | None:
    """Return the median over repetitions; None where one of the variants is lacking."""
    if over not in found or under not in found:
        return None
    return statistics.median(a / b for a, b in zip(found[over], found[under], strict=True))
