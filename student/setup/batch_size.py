"""The batch of a process is what the user gave, what a resumed run had, or what fits the
pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from featcache.errors import UsageError, counted
from featcache.storage import identity
from student import checkpoint

BATCH_SIZE = 64  # per process where none is given, or all pictures where there are fewer


class BatchOptions(Protocol):
    """The options of a command that trains say this of its batches."""

    @property
    def batch_size(self) -> int | None: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def resume(self) -> bool: ...


def chosen_batch_size(
    options: BatchOptions, n: int, acc: Accelerator, out: Path, repeats: int = 1
) -> int:
    """Return the samples a process and micro-batch, of n pictures in `repeats` views each."""
    return options.batch_size or _resumed(out, options, acc) or _fitting(n, options, acc, repeats)


def _fitting(n: int, options: BatchOptions, acc: Accelerator, repeats: int) -> int:
    """BATCH_SIZE, or fewer where n pictures make no such batch; a multiple of the repeats."""
    fitting = max(n // acc.num_processes // options.accumulate, 1) * repeats
    return min(BATCH_SIZE // repeats * repeats or repeats, fitting)


def _resumed(out: Path, options: BatchOptions, acc: Accelerator) -> int | None:
    """Return what keeps the global batch of the run that is resumed, whatever the number of
    processes; None where there is no such run."""
    if not (options.resume and (out / checkpoint.CONFIG).is_file()):
        return None
    total = dict(identity.flatten({"run": checkpoint.read_config(out)})).get(
        "run.data.global_batch"
    )
    if not isinstance(total, int):
        return None  # no run of ours, as the comparison with this one will tell
    parts = acc.num_processes * options.accumulate
    if total % parts:
        raise UsageError(
            f"--resume: a step of {str(out)!r} takes {counted(total, 'picture')}, which "
            f"{counted(acc.num_processes, 'process', 'processes')} x --accumulate "
            f"{options.accumulate} cannot share evenly; give a number of "
            f"processes and an --accumulate whose product divides {total}"
        )
    return total // parts
