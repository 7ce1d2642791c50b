"""The trainer: one loop for every recipe, from a laptop to a cluster, through Accelerate.

It knows no recipe by name. A step is a pure function of (weights, seed, step): batches, masks and drop path are seeded
by arithmetic, so a run that was interrupted goes on as if nothing had happened. Accelerate prepares the model and the
optimizer; never the loader (it would split batches again) and not the schedule (it would step once a process).
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import featcache
from featcache import manifest, rng
from featcache.device import pick_device
from featcache.errors import UsageError, UserError
from student import checkpoint, optim, stop
from student.config import RecipeConfig, as_dict
from student.feed import Feed, Share, Wait
from student.loader import Loader
from student.metrics import NAME, Metrics, cut, read
from student.targets import Targets

READING = "targets.reading."  # how a cache was read, in config.json: of no effect on any number
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Job:
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

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        return steps_per_epoch * self.config.epochs if self.steps is None else self.steps


def accelerator(precision: str, device: str | None = None) -> Accelerator:
    """Accelerate for this process; `auto` is bf16 where the GPU has it and fp32 elsewhere."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r}: {', '.join(PRECISIONS)} are allowed")
    if device is not None and torch.device(pick_device(device)).type == "cuda":
        torch.cuda.set_device(device)
    cuda = torch.cuda.is_available() and device != "cpu"
    if precision == "fp16" and not cuda:
        raise UsageError("--precision fp16 needs a GPU, this device is a CPU; fp32 and bf16 are allowed here")
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not cuda)


def train(job: Job, loader: Loader, acc: Accelerator) -> dict[str, Any]:
    """Run the job to its end; returns a summary. The run folder holds config.json, metrics.jsonl, environment.json and
    checkpoints/."""
    # ---- what is to be done -------------------------------------------------------------------------------------
    total = job.total_steps(loader.steps_per_epoch)
    warmup = round(job.config.warmup_epochs * loader.steps_per_epoch)
    peak = optim.peak_lr(job.config, loader.global_batch)
    record = _record(job, loader, acc, total)
    if acc.is_main_process:
        _check_run(job, record)

    # ---- model and optimizer, or the checkpoint: what cannot be built leaves no run folder behind -------------------
    torch.manual_seed(job.seed)
    model = job.recipe.Model(job.config).to(acc.device)
    optimizer = optim.adamw(model, job.config, peak)
    state = checkpoint.newest(job.out) if job.resume and checkpoint.complete(job.out) else None
    first = 0 if state is None else checkpoint.restore(job.out, state, model, optimizer)
    model, optimizer = acc.prepare(model, optimizer)
    if state is not None and acc.scaler is not None and state["scaler"]:
        acc.scaler.load_state_dict(state["scaler"])
    model.train()

    # ---- the run folder ------------------------------------------------------------------------------------------
    is_new = acc.is_main_process and _make_run(job, record)
    acc.wait_for_everyone()

    # ---- the loop -------------------------------------------------------------------------------------------------
    save_every = job.save_every or loader.steps_per_epoch
    with contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(_forget_unbegun, job.out)  # last of all, when metrics are closed
        metrics = stack.enter_context(contextlib.closing(_metrics(job, first, acc)))
        hosts = stack.enter_context(contextlib.closing(loader.iterate(first, total)))
        batches = Feed(job.config, job.targets, hosts, acc.device, job.seed)
        bar = stack.enter_context(_bar(total, first, acc))
        notice = stack.enter_context(stop.Notice(acc))
        for step in range(first, total):
            started = time.perf_counter()
            lr = optim.lr_at(step, total, warmup, peak, job.config.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            parts, waits, keys = _step(job, loader, acc, model, optimizer, batches, step, step + 1 == total)
            row = {"step": step + 1, "epoch": step // loader.steps_per_epoch, **parts, "lr": lr}
            row.update(_speed(loader, started, waits))
            _look(metrics.add({**row, "keys": keys}), job.out)
            bar.update_with(row)
            due = notice.due()
            if (due or (step + 1) % save_every == 0) and step + 1 < total:
                _save(job.out, step + 1, acc, model, optimizer, metrics)
            if due and step + 1 < total:
                raise stop.error(step + 1, total, notice.asked, job.resume)
        _look(metrics.flush(), job.out)
        if first < total or not checkpoint.complete(job.out):
            _save(job.out, total, acc, model, optimizer, metrics)
    rows = read(job.out) if bar.loss is None else []  # a run that was complete: its own last loss
    loss = rows[-1]["loss"] if rows else bar.loss
    return {"run": str(job.out), "steps": total, "first_step": first, **record["data"], "loss": loss}


def _step(
    job: Job, loader: Loader, acc: Accelerator, model: Any, optimizer: Any, batches: Feed, step: int, last_step: bool
) -> tuple[dict[str, Tensor], list[Wait], list[str]]:
    """One optimiser step over its micro-batches: mean parts of the loss, waits for data, sample keys."""
    sums: dict[str, Tensor] = {}
    waits: list[Wait] = []
    keys: list[str] = []
    for micro in range(loader.accumulation):
        taken = batches.take()
        waits.append(taken.waited)
        keys += taken.keys
        torch.manual_seed(step_seed(job.seed, step, micro, loader.rank))  # drop path draws from the global generator
        last = micro == loader.accumulation - 1
        with contextlib.nullcontext() if last else acc.no_sync(model):
            with acc.autocast():
                parts = model(taken.batch)
            acc.backward(parts["loss"] / loader.accumulation)
        if not last:
            batches.launched()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach() / loader.accumulation
    if job.config.clip_grad is not None:
        sums["grad_norm"] = acc.clip_grad_norm_(model.parameters(), job.config.clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batches.launched(last_step)
    if acc.num_processes > 1:
        sums = {name: acc.reduce(value, "mean") for name, value in sums.items()}
    return sums, waits, keys


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of what is drawn inside the model in one micro-step: a word of (seed, step, micro-batch, process)."""
    word = rng.words(rng.key_digests([f"step:{micro}:{rank}"]), rng.stream("model", seed), 1, epoch=step)[0, 0]
    return int(word >> np.uint64(1))


def _look(rows: list[dict[str, Any]], run: Path) -> None:
    """Stop at a loss that is not finite: nothing that follows it would mean anything."""
    for row in rows:
        if not np.isfinite(row["loss"]):
            keys = row["keys"]
            raise UserError(
                f"loss is {row['loss']} at step {row['step']} (pictures {', '.join(keys[:4])}"
                f"{' ...' if len(keys) > 4 else ''}); checkpoints before it are in {run}/checkpoints: lower the rate, "
                "or use --precision fp32 or bf16"
            )


def _speed(loader: Loader, started: float, waits: list[Wait]) -> dict[str, Any]:
    """Samples a second over all processes, and the share of the step spent waiting for data."""
    seconds = max(time.perf_counter() - started, 1e-9)
    return {"images_per_s": round(loader.global_batch / seconds, 2), "data_wait": Share(waits, seconds)}


def _metrics(job: Job, first: int, acc: Accelerator) -> Metrics:
    """The first process writes; the others look at their losses all the same."""
    if acc.is_main_process:
        cut(job.out, first)
    return Metrics(job.out if acc.is_main_process else None, lag=16 if acc.device.type == "cuda" else 0)


def _save(run: Path, step: int, acc: Accelerator, model: Any, optimizer: Any, metrics: Metrics) -> None:
    _look(metrics.flush(), run)  # a checkpoint never follows a loss that was not finite
    acc.wait_for_everyone()
    if not acc.is_main_process:
        return
    scaler = acc.scaler.state_dict() if acc.scaler is not None else {}
    state = {"model": acc.unwrap_model(model).state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler}
    checkpoint.save(run, step, state)


def _record(job: Job, loader: Loader, acc: Accelerator, total: int) -> dict[str, Any]:
    """config.json: what a resumed run must agree with."""
    return {
        "recipe": job.name,
        "config": as_dict(job.config),
        "seed": job.seed,
        "steps": total,
        "precision": acc.mixed_precision,
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


def _check_run(job: Job, record: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, or another run than the one to resume."""
    path = job.out / checkpoint.CONFIG
    if job.resume and path.is_file():
        before, now = (dict(manifest.flat(each)) for each in (checkpoint.config(job.out), record))
        names = [key for key in {**before, **now} if not key.startswith(READING)]
        changed = [key for key in names if before.get(key) != now.get(key)]
        if changed:
            shown = "; ".join(f"{key} {before.get(key)!r} before, {now.get(key)!r} now" for key in changed[:4])
            more = f"; and {', '.join(changed[4:])}" if changed[4:] else ""
            raise UserError(f"--resume: {str(job.out)!r} is another run: {shown}{more}; give its own arguments")
    elif job.out.exists() and any(not each.name.startswith(".") for each in job.out.iterdir()):
        raise UserError(f"--out {str(job.out)!r} is not empty; continue that run with --resume, or give another --out")


def _make_run(job: Job, record: dict[str, Any]) -> bool:
    """Make the run folder and what it begins with; whether there was no run in it before."""
    path = job.out / checkpoint.CONFIG
    is_new = not path.is_file()
    job.out.mkdir(parents=True, exist_ok=True)
    # The record first: a process that dies from here on leaves a run that --resume takes.
    manifest.write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    manifest.write_file(job.out / "environment.json", (json.dumps(environment(), indent=1) + "\n").encode())
    (job.out / NAME).touch()
    return is_new


def _forget_unbegun(run: Path) -> None:
    """Remove the folder of a new run that ended before its first step, so that the corrected command finds it free."""
    if checkpoint.complete(run) or read(run):
        return
    for name in (NAME, "environment.json", checkpoint.CONFIG):
        (run / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        run.rmdir()


def environment() -> dict[str, Any]:
    """Versions, device and commit of this process, for people who compare runs."""
    import timm

    versions = {"featcache": featcache.__version__, "torch": torch.__version__, "timm": timm.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        **versions,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": commit or None,
        "command": sys.argv,
    }


class _Bar:
    """Progress for a person at a terminal; keeps the last loss for the summary."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.loss: float | None = None

    def update_with(self, row: dict[str, Any]) -> None:
        if isinstance(row["loss"], Tensor) and row["loss"].device.type == "cuda" and row["step"] % 20:
            self.bar.update()
            return
        self.loss = round(float(row["loss"]), 6)
        self.bar.set_postfix_str(
            f"epoch {row['epoch']}  loss {self.loss:.4f}  lr {row['lr']:.2e}  {row['images_per_s']:.0f} images/s  "
            f"waiting for data {row['data_wait'].item():.0%}",
            refresh=False,
        )
        self.bar.update()


@contextlib.contextmanager
def _bar(total: int, first: int, acc: Accelerator) -> Iterator[_Bar]:
    from tqdm import tqdm

    quiet = not acc.is_main_process or not sys.stderr.isatty()
    with tqdm(total=total, initial=first, unit="step", disable=quiet, dynamic_ncols=True) as bar:
        yield _Bar(bar)
