"""The trainer: one loop for every recipe, from a laptop to a cluster, through Accelerate.

It knows no recipe by name. A step is a pure function of (weights, seed, step): batches, masks and
drop path are seeded by arithmetic, so a run that was interrupted goes on as if nothing had
happened. Accelerate prepares the model and the optimizer; never the loader (it would split batches
again) and not the schedule (it would step once a process).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from featcache import rng
from featcache.errors import UserError
from featcache.storage import manifest
from student import checkpoint
from student.config import RecipeConfig, as_dict
from student.data.loader import Loader
from student.data.prefetch import Prefetcher, WaitShare, WaitTime, to_device
from student.targets.contract import HostBatch, Targets
from student.training import (
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

# on a GPU: steps until a row of metrics is looked at, so that the device is not waited for
LATE_ROWS = 16


@dataclass(frozen=True)
class Run:
    """One run: everything its numbers depend on, and where they go."""

    name: str  # of the recipe
    recipe: ModuleType
    config: RecipeConfig
    targets: Targets
    out: Path
    seed: int
    about: dict[str, Any]  # identity of the targets, for config.json
    steps: int | None = None  # optimiser steps; None: config.epochs
    save_every: int | None = None  # steps; None: an epoch
    resume: bool = False
    run_options: RunOptions = field(default_factory=RunOptions)
    trackers: tuple[str, ...] = ()  # beside metrics.jsonl

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        return steps_per_epoch * self.config.epochs if self.steps is None else self.steps


def train(job: Run, loader: Loader, acc: Accelerator) -> dict[str, Any]:
    """Run the job to its end; returns a summary. The run folder holds config.json, metrics.jsonl,
    environment.json and checkpoints/."""
    with out_of_memory_told(loader.batch_size):
        return _train(job, loader, acc)


def _train(job: Run, loader: Loader, acc: Accelerator) -> dict[str, Any]:
    # ---- what is to be done ----------------------------------------------------------------------
    total = job.total_steps(loader.steps_per_epoch)
    record = _record(job, loader, acc, total)
    if acc.is_main_process:
        run_folder.check(job.out, record, job.resume)

    # ---- model and optimizer, or the checkpoint: what cannot be built leaves no run folder behind
    state = (
        checkpoint.load_latest(job.out)
        if job.resume and checkpoint.list_checkpoints(job.out)
        else None
    )
    first = 0 if state is None else int(state["step"])
    pupil = build_state(job, loader, acc, state)

    # ---- the run folder --------------------------------------------------------------------------
    is_new = acc.is_main_process and run_folder.make(job.out, record)
    acc.wait_for_everyone()

    # ---- the loop --------------------------------------------------------------------------------
    save_every = job.save_every or loader.steps_per_epoch
    with contextlib.ExitStack() as stack:
        if is_new:
            # last of all, when metrics are closed
            stack.callback(run_folder.forget_unbegun, job.out)
        log = stack.enter_context(
            trackers.start_trackers(job.trackers, acc, job.out, record, first)
        )
        metrics = stack.enter_context(contextlib.closing(_metrics(job, first, acc, log)))
        hosts = stack.enter_context(contextlib.closing(loader.iterate(first, total)))
        feed = Prefetcher(job.config, job.targets, hosts, acc.device, job.seed)
        bar = stack.enter_context(
            progress_bar.shown(total, first, loader.steps_per_epoch, acc.is_main_process)
        )
        notice = stack.enter_context(preemption.StopNotice(acc))
        for step in range(first, total):
            row = train_step(job, loader, pupil, feed, step, total)
            look = metrics.add if row["applied"] else metrics.flush_with
            _check_losses(look(row), job, loader, pupil)
            bar.update_with(row)
            due = notice.due()
            if (due or (step + 1) % save_every == 0) and step + 1 < total:
                _save(job, loader, pupil, step + 1, metrics)
            if due and step + 1 < total:
                raise preemption.stopped_error(step + 1, total, notice.asked, job.resume)
        _check_losses(metrics.flush(), job, loader, pupil)
        if first < total or not checkpoint.list_checkpoints(job.out):
            _save(job, loader, pupil, total, metrics)
    rows = read(job.out)
    skipped = {"skipped": pupil.skipped} if job.run_options.skip_nonfinite is not None else {}
    # samples whose targets the teacher made
    computed = [row["fallback"] for row in rows if "fallback" in row]
    facts = {"run": str(job.out), "steps": total, "first_step": first, **record["data"], **skipped}
    facts |= {"fallback": sum(computed)} if computed else {}
    return {**facts, "loss": rows[-1]["loss"] if rows else None}


def build_state(
    job: Run, loader: Loader, acc: Accelerator, state: dict[str, Any] | None = None
) -> TrainState:
    """The job's model and optimizer, as the seed or a checkpoint has them."""
    torch.manual_seed(job.seed)
    model = job.recipe.Model(job.config).to(acc.device)
    optimizer = optim.adamw(model, job.config, optim.peak_lr(job.config, loader.global_batch))
    return train_state.build_train_state(acc, model, optimizer, job.run_options, job.out, state)


def train_step(
    job: Run, loader: Loader, pupil: TrainState, feed: Prefetcher, step: int, total: int
) -> dict[str, Any]:
    """One optimiser step at its rate; returns its row of metrics, and what is not written of it
    (metrics.UNWRITTEN)."""
    started = time.perf_counter()
    warmup = round(job.config.warmup_epochs * loader.steps_per_epoch)
    peak = optim.peak_lr(job.config, loader.global_batch)
    lr = optim.warmup_cosine(step, total=total, warmup=warmup, peak=peak, minimum=job.config.min_lr)
    for group in pupil.optimizer.param_groups:
        group["lr"] = lr
    parts, waits, keys = _gradients(job, loader, pupil, feed, step)
    applied = pupil.update(parts["loss"], step)
    row = {"step": step + 1, "epoch": step // loader.steps_per_epoch, **parts, "lr": lr}
    row |= job.targets.noted(loader.step_rows(step)[0])
    if job.run_options.skip_nonfinite is not None:
        row["skipped"] = pupil.skipped
    return {
        **row,
        **_speed(loader, started, waits),
        "keys": keys,
        "applied": applied,
        "waits": waits,
    }


def _gradients(
    job: Run, loader: Loader, pupil: TrainState, feed: Prefetcher, step: int
) -> tuple[dict[str, Tensor], list[WaitTime], list[str]]:
    """Forward and backward of a step's micro-batches: mean parts of the loss, waits for data,
    sample keys."""
    acc, sums = pupil.acc, dict[str, Tensor]()
    waits, keys = list[WaitTime](), list[str]()
    for micro in range(loader.accumulation):
        taken = feed.take()
        waits.append(taken.waited)
        keys += taken.keys
        # drop path draws from the global generator
        torch.manual_seed(step_seed(job.seed, step, micro, loader.rank))
        last = micro == loader.accumulation - 1
        with contextlib.nullcontext() if last else acc.no_sync(pupil.model):
            with acc.autocast():
                parts = pupil.model(taken.batch)
            acc.backward(parts["loss"] / loader.accumulation)
        feed.bring()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach() / loader.accumulation
    if job.config.clip_grad is not None:
        sums["grad_norm"] = train_state.whole(
            acc.clip_grad_norm_(pupil.model.parameters(), job.config.clip_grad)
        )
    if acc.num_processes > 1:
        sums = {name: acc.reduce(value, "mean") for name, value in sums.items()}
    return sums, waits, keys


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of what is drawn inside the model in one micro-step: a word of (seed, step, micro-batch,
    process)."""
    word = rng.words(
        rng.key_digests([f"step:{micro}:{rank}"]), rng.stream("model", seed), 1, epoch=step
    )[0, 0]
    return int(word >> np.uint64(1))


def _speed(loader: Loader, started: float, waits: list[WaitTime]) -> dict[str, Any]:
    """Samples a second over all processes, and the share of the step spent waiting for data."""
    seconds = max(time.perf_counter() - started, 1e-9)
    return {
        "images_per_s": round(loader.global_batch / seconds, 2),
        "data_wait": WaitShare(waits, seconds),
    }


def _check_losses(rows: list[dict[str, Any]], job: Run, loader: Loader, pupil: TrainState) -> None:
    """Stop at a loss that is not finite, with what runs it again: nothing that follows it would
    mean anything. Some may be left out (--skip-nonfinite): those were not applied."""
    allowed = job.run_options.skip_nonfinite
    for row in rows:
        if np.isfinite(row["loss"]):
            continue
        stops = allowed is None or pupil.skipped > allowed
        # the first is kept, and the one that was too many: each is as large as a model
        if stops or pupil.skipped == 1:
            what = _reproduce(job, loader, pupil, row)
        if stops:
            raise UserError(f"loss is {row['loss']} at step {row['step']} {what}")


def _reproduce(job: Run, loader: Loader, pupil: TrainState, row: dict[str, Any]) -> str:
    """Keep the first micro-batch whose loss was not finite; says what a person should know. A
    meeting of all."""
    acc, step = pupil.acc, row["step"] - 1
    with contextlib.closing(loader.iterate(step, step + 1)) as batches:
        found = nonfinite.find_nonfinite(pupil, _micros(job, loader, acc, batches, step))
    had = acc.gather(torch.tensor([found is not None], device=acc.device)).tolist()
    weights = pupil.weights()
    place = f"{job.out}/{checkpoint.FOLDER}"
    cure = (
        "lower the rate, or use --precision fp32 or bf16, or leave such steps out with "
        "--skip-nonfinite N"
    )
    if job.run_options.skip_nonfinite is not None:
        cure = (
            f"the {pupil.skipped} steps left out are more than --skip-nonfinite "
            f"{job.run_options.skip_nonfinite}"
        )
    if True not in had:
        return (
            "and finite when the step is run again: suspect the machine; checkpoints before it are "
            f"in {place}"
        )
    first = had.index(True)
    path = nonfinite.path(job.out, row["step"], first)
    who = f"those of process {first}"
    if found is not None and first == loader.rank:
        nonfinite.save(path, row["step"], _record(job, loader, acc, 0), first, weights, *found)
        keys = found[0].keys
        who = f"{', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"
    return (
        f"(pictures {who}); `student replay {path}` runs that batch again; checkpoints before it "
        f"are in {place}: {cure}"
    )


def _micros(
    job: Run, loader: Loader, acc: Accelerator, batches: Iterator[HostBatch], step: int
) -> Iterator[nonfinite.MicroBatch]:
    for number, host in enumerate(batches):
        batch = to_device(job.config, job.targets, host, acc.device, job.seed)
        yield nonfinite.MicroBatch(
            number, host["keys"], batch, step_seed(job.seed, step, number, loader.rank)
        )


def _metrics(job: Run, first: int, acc: Accelerator, log: trackers.Log | None) -> Metrics:
    """The first process writes; the others look at their losses all the same."""
    if acc.is_main_process:
        cut(job.out, first)
    lag = LATE_ROWS if acc.device.type == "cuda" else 0
    return Metrics(job.out if acc.is_main_process else None, lag, log)


def _save(job: Run, loader: Loader, pupil: TrainState, step: int, metrics: Metrics) -> None:
    # a checkpoint never follows a loss that was not finite
    _check_losses(metrics.flush(), job, loader, pupil)
    pupil.acc.wait_for_everyone()
    state = pupil.state()
    if pupil.acc.is_main_process:
        checkpoint.save(job.out, step, state)


def _record(job: Run, loader: Loader, acc: Accelerator, total: int) -> dict[str, Any]:
    """config.json: what a resumed run must agree with."""
    run_options = asdict(job.run_options)
    return {
        "recipe": job.name,
        "config": as_dict(job.config),
        "seed": job.seed,
        "steps": total,
        "precision": acc.mixed_precision,
        "ema": run_options.pop("ema"),
        "running": run_options,
        "targets": job.about,
        "data": {
            "pictures": len(loader.pictures),
            "keys_digest": manifest.keys_digest(loader.source.keys[i] for i in loader.pictures),
            "global_batch": loader.global_batch,
            "steps_per_epoch": loader.steps_per_epoch,
            "sampling": "random" if loader.places is None else "block",
            "aug_repeats": loader.repeats,
        },
    }
