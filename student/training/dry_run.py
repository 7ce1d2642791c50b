"""A dry run measures what a run will cost (`student train --dry-run`), by a few real steps and a
few real reads.

    time      the step without waiting for data, and with it        -> an epoch
    memory    weights, gradients, moments, average, and what the forward keeps for the backward pass
    the disk  bytes a step wants at that speed, against what the cache's own files give past the
              page cache

Nothing is written; the weights that the steps have moved are dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from featcache.console.text import format_bytes, join_lines
from featcache.errors import UserError
from featcache.reading.cache import Cache
from featcache.runtime import device as devices
from student.data.loader import Loader
from student.data.prefetch import Prefetcher
from student.targets.cached import CachedTargets
from student.targets.contract import Targets
from student.targets.fallback import FallbackTargets
from student.training import progress_bar, train, train_state
from student.training.train import Run
from student.training.train_state import TrainState

STEPS = 4  # the first is not counted: memory is found, kernels are chosen, code is compiled
MOST_S = 60.0  # no further step is begun after so long
READ_S, READ_BYTES = 2.0, 1 << 30  # how long, and how much at most, is read to know the disk


def measure(run: Run, loader: Loader, acc: Accelerator) -> dict[str, Any]:
    """Return the facts of a dry run beyond those of the run; every process takes part."""
    state = train.build_state(run, loader, acc)
    encoder: Any = state.module.encoder
    facts: dict[str, Any] = {
        "parameters": _count(state.module),
        "encoder_parameters": _count(encoder),
    }
    walls, computing, kept = _steps(run, loader, state)
    facts["memory"] = memory(state, kept if not run.run_options.compiled else None)
    if computing:
        facts |= {
            "step_s": round(statistics.median(walls), 4),
            "step_without_waiting_s": round(statistics.median(computing), 4),
            "images_per_s": round(loader.global_batch / statistics.median(walls), 2),
            "epoch_s": round(loader.steps_per_epoch * statistics.median(walls), 3),
        }
        images_per_s = loader.global_batch / statistics.median(computing)
        facts |= _disk(run.targets, loader, images_per_s)
    return facts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _steps(run: Run, loader: Loader, state: TrainState) -> tuple[list[float], list[float], int]:
    """Return seconds of each counted step, those less the wait for data, and bytes kept for the
    backward pass."""
    total = run.total_steps(loader.steps_per_epoch)
    walls, computing, kept = [], [], 0
    begun = time.perf_counter()
    with contextlib.closing(loader.iterate(0, min(STEPS, total), state.drop_rates)) as hosts:
        feed = Prefetcher(run.config, run.targets, hosts, state.acc.device, run.seed)
        for step in range(min(STEPS, total)):
            if step > 1 and time.perf_counter() - begun > MOST_S and state.acc.num_processes == 1:
                break
            start = time.perf_counter()
            with (
                _kept(state.module)
                if step == 0 and not run.run_options.compiled
                else contextlib.nullcontext([0]) as count
            ):
                result = train.train_step(run, loader, state, feed, step, total)
            if devices.is_gpu(state.acc.device):
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
            if step == 0:
                kept = count[0]
            if step > 0 or total == 1:
                walls.append(wall)
                computing.append(max(wall - sum(wait.item() for wait in result.waits), 1e-9))
    return walls, computing, kept


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[list[int]]:
    """Count the bytes that autograd keeps for the backward pass, those of the weights left out; the
    list holds them when the block ends."""
    weights = {
        parameter.untyped_storage().data_ptr()
        for parameter in module.parameters()
        if _is_plain(parameter)
    }
    storages: dict[int, int] = {}
    count = [0]

    def note(tensor: Tensor) -> Tensor:
        if _is_plain(tensor) and (storage := tensor.untyped_storage()).data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield count
    count[0] = sum(storages.values())


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's memory is its own; a sharded one (DTensor) has no storage to ask
    for."""
    return type(tensor) in (Tensor, nn.Parameter)


def memory(state: TrainState, kept: int | None) -> dict[str, int | None]:
    """Return bytes in this process: by arithmetic, those kept for the backward pass as counted, and
    the most that was used."""
    share = state.acc.num_processes if train_state.sharded(state.acc) else 1
    own = sum(each.nbytes for each in state.module.parameters()) // share
    learnt = sum(each.nbytes for each in state.module.parameters() if each.requires_grad) // share
    parts = {"weights": own, "gradients": learnt, "moments": 2 * learnt}
    parts |= {"average": own} if state.average is not None else {}
    sums = None if kept is None else sum(parts.values()) + kept
    return {**parts, "activations": kept, "sum": sums, "most_used": progress_bar.memory_bytes()}


def _disk(targets: Targets, loader: Loader, images_per_s: float) -> dict[str, Any]:
    """Return the bytes a second that the student wants of the cache, and those its files give."""
    if not isinstance(targets, CachedTargets | FallbackTargets):
        return {}
    wanted, direct = _directly(targets), True
    try:
        _bytes_of(wanted, loader, 0)
    except UserError as error:
        # what a file system says that knows no O_DIRECT: there the page cache may help
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL):
            raise
        wanted, direct = targets, False
    per_picture = _bytes_of(wanted, loader, 0) / loader.batch_size
    given = bytes_per_s(lambda step: _bytes_of(wanted, loader, step), loader.steps_per_epoch)
    return {
        "bytes_per_picture": round(per_picture),
        "wanted_bytes_per_s": round(per_picture * images_per_s),
        "given_bytes_per_s": round(given),
        "past_page_cache": direct,
    }


def _directly(targets: CachedTargets | FallbackTargets) -> Targets:
    cached = targets.cached if isinstance(targets, FallbackTargets) else targets
    cache = Cache(cached.cache.path, verify_rows=0, io="direct", partial=bool(cached.cache.absent))
    cached = dataclasses.replace(cached, cache=cache)
    return (
        dataclasses.replace(targets, cached=cached)
        if isinstance(targets, FallbackTargets)
        else cached
    )


def _bytes_of(targets: Targets, loader: Loader, step: int) -> int:
    """Read the targets of this process for a step; return their bytes."""
    at, epoch = loader.rows(step)
    arrays = targets.fetch(at, targets.view(loader.digests[at], epoch))
    return sum(each.nbytes for each in arrays.values() if isinstance(each, np.ndarray))


def bytes_per_s(
    read: Callable[[int], int], steps: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return bytes a second of `read(step)` over the steps of an epoch, for some seconds or
    bytes."""
    start, total = clock(), 0
    for step in range(steps):
        total += read(step)
        if clock() - start > READ_S or total > READ_BYTES:
            break
    return total / max(clock() - start, 1e-9)


def text(facts: dict[str, Any]) -> str:
    """Return the facts of a dry run as text for a person."""
    lines = join_lines(f"{key}: {_shown(key, value)}" for key, value in facts.items())
    return lines + _verdict(facts)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {'not counted' if part is None else format_bytes(part)}"
            for name, part in value.items()
        )
    return (
        f"{format_bytes(value)}/s"
        if key.endswith("_bytes_per_s")
        else format_bytes(value)
        if key.startswith("bytes_")
        else str(value)
    )


def _verdict(facts: dict[str, Any]) -> str:
    if "given_bytes_per_s" not in facts:
        return ""
    times = facts["given_bytes_per_s"] / facts["wanted_bytes_per_s"]
    advice = (
        ""
        if times >= 1
        else "; stage the cache on a faster disk, or extract with --tokens ranked and --keep"
    )
    return f"\nthe disk gives {times:.1f} times what the student wants of the cache{advice}"
