"""The trainer runs one loop for every recipe, from a laptop to a cluster, through Accelerate.

It knows no recipe by name. A step is a pure function of (weights, seed, step): batches, masks and
drop path are seeded by arithmetic, so a run that was interrupted goes on as if nothing had
happened. Accelerate prepares the model and the optimizer; never the loader (it would split batches
again) and not the schedule (it would step once a process).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from featcache import rng
from featcache.errors import UserError, command_line, counted
from featcache.runtime.device_clock import Seconds, StepClock
from featcache.runtime.meter import meter
from featcache.storage import manifest
from student import checkpoint
from student.config import TrainConfig, as_dict, default_values
from student.data.device_queue import LateNumbers, lag
from student.data.loader import Loader
from student.data.prefetch import Prefetcher, step_speed, to_device
from student.models import drop_path
from student.targets.contract import HostBatch, Targets
from student.training import (
    lengthening,
    nonfinite,
    optim,
    preemption,
    progress_bar,
    run_folder,
    trackers,
    train_state,
)
from student.training.accelerator import out_of_memory_told
from student.training.metrics import Metrics, cut, read
from student.training.train_state import RunOptions, TrainState

_LOG = logging.getLogger(__name__)


class Watch(Protocol):
    """Measures a model while it is trained, without changing a number of the run."""

    @property
    def facts(self) -> str:
        """Return pictures and pace in words."""
        ...

    def started(
        self, state: TrainState, out: Path, first: int, total: int, steps_per_epoch: int
    ) -> contextlib.AbstractContextManager[Callable[[int], dict[str, float]]]:
        """Give what adds values to the row of metrics of each step, counted from 1, called by every
        process."""
        ...


@dataclass(frozen=True)
class Run:
    """Names everything the numbers of a run depend on, and the folder they go to."""

    name: str  # of the recipe
    recipe: ModuleType
    config: TrainConfig
    targets: Targets
    out: Path
    seed: int
    about: dict[str, Any]  # identity of the targets, for config.json
    steps: int | None = None  # optimiser steps; None: config.epochs
    save_every: int | None = None  # steps; None: an epoch
    resume: bool = False
    run_options: RunOptions = field(default_factory=RunOptions)
    trackers: tuple[str, ...] = ()  # beside metrics.jsonl
    retention: checkpoint.Retention = field(default_factory=checkpoint.Retention)
    watch: Watch | None = None  # measures the model as the run goes on
    # gives a new model its first weights; None: those of the seed
    start: Callable[[nn.Module], None] | None = None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser steps of the whole run."""
        return steps_per_epoch * self.config.epochs if self.steps is None else self.steps


@dataclass(frozen=True)
class StepResult:
    """Holds the outcome of one optimiser step in this process."""

    row: dict[str, Any]  # of metrics
    keys: list[str]  # of this process's samples
    applied: bool  # False: the loss is known not to be finite, nothing was changed
    waits: list[Seconds]  # for data, one a micro-batch


def train(
    run: Run, loader: Loader, acc: Accelerator, display: progress_bar.Display = progress_bar.shown
) -> dict[str, Any]:
    """Train to the end of the run and return a summary; steps are told to `display`. The run folder
    holds config.json, metrics.jsonl, environment.json, checkpoints/ and encoder.safetensors."""
    with out_of_memory_told(loader.batch_size):
        return _train(run, loader, acc, display)


def _train(
    run: Run, loader: Loader, acc: Accelerator, display: progress_bar.Display
) -> dict[str, Any]:
    # ---- what is to be done ----------------------------------------------------------------------
    total = run.total_steps(loader.steps_per_epoch)
    record = _record(run, loader, acc, total)
    if acc.is_main_process:
        record = lengthening.with_plans(record, run.out) if run.resume else record
        run_folder.check(run.out, record, run.resume, default_values(run.config))

    # ---- model and optimizer, or the checkpoint: what cannot be built leaves no run folder behind
    resumes = run.resume and checkpoint.list_checkpoints(run.out)
    saved = checkpoint.load_latest(run.out) if resumes else None
    first = 0 if saved is None else int(saved["step"])
    state = build_state(run, loader, acc, saved)

    # ---- the run folder --------------------------------------------------------------------------
    is_new = acc.is_main_process and run_folder.make(run.out, record)
    acc.wait_for_everyone()
    if note := lengthening.note(record, first, _schedule(run, loader)):
        _LOG.warning("%s", note)

    # ---- the loop --------------------------------------------------------------------------------
    save_every = run.save_every or loader.steps_per_epoch
    with contextlib.ExitStack() as stack:
        # ends last: a notice that comes while the rest is closed takes no line and no status away
        notices = stack.enter_context(contextlib.ExitStack())
        if is_new:
            # last of all, when metrics are closed
            stack.callback(run_folder.forget_unbegun, run.out)
        log = stack.enter_context(
            trackers.start_trackers(run.trackers, acc, run.out, record, first)
        )
        metrics = stack.enter_context(contextlib.closing(_metrics(run, first, acc, log)))
        hosts = stack.enter_context(
            contextlib.closing(loader.iterate(first, total, state.drop_rates))
        )
        watched = stack.enter_context(
            run.watch.started(state, run.out, first, total, loader.steps_per_epoch)
            if run.watch is not None
            else contextlib.nullcontext(_nothing)
        )
        feed = Prefetcher(run.config, run.targets, hosts, acc.device, run.seed)
        bar = stack.enter_context(
            display(total, first, loader.steps_per_epoch, acc.is_main_process)
        )
        notice = notices.enter_context(preemption.StopNotice(acc, bar.stopping))
        for step in range(first, total):
            result = train_step(run, loader, state, feed, step, total)
            result.row.update(watched(step + 1))
            rows = metrics.add(result.row) if result.applied else metrics.flush_with(result.row)
            _check_losses(rows, run, loader, state)
            bar.update_with(step + 1, rows)
            due = notice.due()
            if (due or (step + 1) % save_every == 0) and step + 1 < total:
                feed.checks.look()
                _save(run, loader, state, step + 1, metrics)
            if due and step + 1 < total:
                raise preemption.stopped_error(step + 1, total, notice.asked, run.resume)
        feed.checks.look()
        _check_losses(metrics.flush(), run, loader, state)
        if first < total or not checkpoint.list_checkpoints(run.out):
            _save(run, loader, state, total, metrics)
    rows = read(run.out)
    skipped = {"skipped": state.skipped} if run.run_options.skip_nonfinite is not None else {}
    # samples whose targets the teacher made
    computed = [row["fallback"] for row in rows if "fallback" in row]
    facts = {"run": str(run.out), "steps": total, "first_step": first, **record["data"], **skipped}
    facts |= {"fallback": sum(computed)} if computed else {}
    return {**facts, "loss": rows[-1].get("loss") if rows else None}


def _nothing(step: int) -> dict[str, float]:
    return {}


def build_state(
    run: Run, loader: Loader, acc: Accelerator, saved: dict[str, Any] | None = None
) -> TrainState:
    """Build the run's model and optimizer, as the seed gives them or as a checkpoint saved them."""
    torch.manual_seed(run.seed)
    model = run.recipe.Model(run.config)
    if saved is None and run.start is not None:
        run.start(model)
    model = model.to(acc.device)
    if acc.is_main_process:
        _note_process_draws(drop_path.process_draws(model))
    optimizer = optim.adamw(model, run.config, optim.peak_lr(run.config, loader.global_batch))
    return train_state.build_train_state(acc, model, optimizer, run.run_options, run.out, saved)


def _note_process_draws(names: list[str]) -> None:
    if names:
        shown = f"{', '.join(names[:4])}{f' and {len(names) - 4} more' * (len(names) > 4)}"
        _LOG.warning(
            "%s of this recipe draw from torch's generator, which is seeded for each process: "
            "another number of processes gives other numbers; student.models.drop_path.DropPath "
            "draws for each sample",
            shown,
        )


def train_step(
    run: Run, loader: Loader, state: TrainState, feed: Prefetcher, step: int, total: int
) -> StepResult:
    """Make one optimiser step at its learning rate."""
    clock = StepClock(state.acc.device)
    lr = _schedule(run, loader)(step, total)
    optim.set_lr(state.optimizer, lr)
    parts, waits, keys = _gradients(run, loader, state, feed, step)
    names, values = list(parts), _mean(state.acc, parts)
    numbers = LateNumbers(values)
    applied = state.update(values[names.index("loss")], step)
    row: dict[str, Any] = {"step": step + 1, "epoch": step // loader.steps_per_epoch}
    row |= {name: numbers.number(i) for i, name in enumerate(names)} | {"lr": lr}
    row |= run.targets.step_metrics(loader.step_rows(step)[0])
    if run.run_options.skip_nonfinite is not None:
        row["skipped"] = state.skipped
    meter.count("views_shown", loader.batch_size * loader.accumulation)
    row |= step_speed(loader.global_batch, clock.seconds(), waits)
    row["time"] = round(time.time(), 3)
    return StepResult(row, keys, applied, waits)


def _schedule(run: Run, loader: Loader) -> optim.Schedule:
    return optim.schedule(run.config, loader.global_batch, loader.steps_per_epoch)


def _gradients(
    run: Run, loader: Loader, state: TrainState, feed: Prefetcher, step: int
) -> tuple[dict[str, Tensor], list[Seconds], list[str]]:
    """Run forward and backward of a step's micro-batches; return this process's mean parts of the
    loss, waits for data and sample keys."""
    acc, sums = state.acc, dict[str, Tensor]()
    waits, keys = list[Seconds](), list[str]()
    for micro in range(loader.accumulation):
        taken = feed.take()
        waits.append(taken.waited)
        keys += taken.keys
        # what a recipe of the user's own draws from torch's generator; ours take it of the batch
        torch.manual_seed(step_seed(run.seed, step, micro, loader.rank))
        last = micro == loader.accumulation - 1
        with contextlib.nullcontext() if last else acc.no_sync(state.model):
            with acc.autocast():
                parts = state.model(taken.batch)
            acc.backward(parts["loss"] / loader.accumulation)
        feed.bring()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach() / loader.accumulation
    if run.config.clip_grad is not None:
        sums["grad_norm"] = train_state.whole(
            acc.clip_grad_norm_(state.model.parameters(), run.config.clip_grad)
        )
    return sums, waits, keys


def _mean(acc: Accelerator, parts: dict[str, Tensor]) -> Tensor:
    """Return the parts of a loss, a number each, as one vector where the loss is: means over the
    processes."""
    device = parts["loss"].device
    values = torch.stack([part.reshape(()).to(device) for part in parts.values()])
    return acc.reduce(values, "mean") if acc.num_processes > 1 else values


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Return the seed of torch's generator in one micro-step, a word of (seed, step, micro-batch,
    process), for modules that draw from it."""
    word = rng.words(
        rng.key_digests([f"step:{micro}:{rank}"]), rng.stream("model", seed), 1, epoch=step
    )[0, 0]
    return int(word >> np.uint64(1))


def _check_losses(rows: list[dict[str, Any]], run: Run, loader: Loader, state: TrainState) -> None:
    """Stop at a loss that is not finite, since nothing that follows it would mean anything, and
    keep its batch. Some may be left out (--skip-nonfinite): those were not applied."""
    allowed = run.run_options.skip_nonfinite
    for row in rows:
        if np.isfinite(row["loss"]):
            continue
        stops = allowed is None or state.skipped > allowed
        # the first is kept, and the one that was too many: each is as large as a model
        if stops or state.skipped == 1:
            what = _reproduce(run, loader, state, row)
        if stops:
            raise UserError(f"loss is {row['loss']} at step {row['step']} {what}")


def _reproduce(run: Run, loader: Loader, state: TrainState, row: dict[str, Any]) -> str:
    """Keep the first micro-batch whose loss was not finite; return what a person should know. A
    collective: all processes take part."""
    acc, step = state.acc, row["step"] - 1
    with contextlib.closing(loader.iterate(step, step + 1, state.drop_rates)) as batches:
        found = nonfinite.find_nonfinite(state, _micros(run, loader, acc, batches, step))
    had = acc.gather(torch.tensor([found is not None], device=acc.device)).tolist()
    weights = state.weights()
    folder = f"{run.out}/{checkpoint.FOLDER}"
    if True not in had:
        return (
            "and finite when the step is run again: suspect the machine; checkpoints before it are "
            f"in {folder}"
        )
    first = had.index(True)
    path = nonfinite.path(run.out, row["step"], first)
    who = f"those of process {first}"
    if found is not None and first == loader.rank:
        nonfinite.save(path, row["step"], _record(run, loader, acc, 0), first, weights, *found)
        keys = found[0].keys
        who = f"{', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"
    return (
        f"(pictures {who}); "
        f"`{command_line('student', 'replay', path)}` runs that batch again; checkpoints before it "
        f"are in {folder}: {_advice(run, state)}"
    )


def _advice(run: Run, state: TrainState) -> str:
    """Return what a person can do about losses that are not finite."""
    if run.run_options.skip_nonfinite is not None:
        return (
            f"the {counted(state.skipped, 'step')} left out are more than --skip-nonfinite "
            f"{run.run_options.skip_nonfinite}"
        )
    return (
        "lower the learning rate, or use --precision fp32 or bf16, or leave such steps out with "
        "--skip-nonfinite N"
    )


def _micros(
    run: Run, loader: Loader, acc: Accelerator, batches: Iterator[HostBatch], step: int
) -> Iterator[nonfinite.MicroBatch]:
    for number, host in enumerate(batches):
        batch = to_device(run.config, run.targets, host, acc.device, run.seed)
        yield nonfinite.MicroBatch(
            number, host["keys"], batch, step_seed(run.seed, step, number, loader.rank)
        )


def _metrics(run: Run, first: int, acc: Accelerator, log: trackers.Log | None) -> Metrics:
    """Open metrics.jsonl in the first process; the others look at their losses all the same."""
    if acc.is_main_process:
        cut(run.out, first)
    return Metrics(run.out if acc.is_main_process else None, lag(acc.device), log)


def _save(run: Run, loader: Loader, state: TrainState, step: int, metrics: Metrics) -> None:
    # a checkpoint never follows a loss that was not finite
    _check_losses(metrics.flush(), run, loader, state)
    state.acc.wait_for_everyone()
    content = state.state_dict()
    if state.acc.is_main_process:
        # the encoder first: killed between the two, a run that goes on makes this step again
        checkpoint.save_encoder(run.out, step, run.name, as_dict(run.config), content["model"])
        checkpoint.save(run.out, step, content, run.retention)


def _record(run: Run, loader: Loader, acc: Accelerator, total: int) -> dict[str, Any]:
    """Return the content of config.json, which a resumed run must agree with."""
    run_options = asdict(run.run_options)
    return {
        "recipe": run.name,
        "config": as_dict(run.config),
        "seed": run.seed,
        "steps": total,
        "precision": acc.mixed_precision,
        "ema": run_options.pop("ema"),
        "running": {
            **run_options,
            "processes": acc.num_processes,
            "batch_size": loader.batch_size,
            "accumulate": loader.accumulation,
        },
        "targets": run.about,
        "data": {
            "pictures": len(loader.pictures),
            "keys_digest": manifest.keys_digest(loader.source.keys[i] for i in loader.pictures),
            "global_batch": loader.global_batch,
            "steps_per_epoch": loader.steps_per_epoch,
            "sampling": "random" if loader.positions is None else "block",
            "aug_repeats": loader.repeats,
        },
    }
