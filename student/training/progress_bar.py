"""A bar at a terminal shows a run: epoch, step, the loss and its parts, learning rate, images a
second, the share of a step spent waiting for data, memory, and the time that is left. Where stderr
is no terminal a line says so every half minute.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from featcache.console.progress_bar import ProgressBar
from student.training import metrics, preemption

# of a row of metrics
NOT_PARTS = ("step", "epoch", "loss", "lr", *metrics.CLOCKS, "rankme", "probe_s")
LONG = ("level_", "cosine_")  # of each level, which would fill the line
PROBED = ("probe_knn", "probe_linear")  # in few rows; the last ones stay in sight


class Steps(Protocol):
    """Is told of each step of a run, and of the first Ctrl-C."""

    def update_with(self, step: int, rows: Sequence[dict[str, Any]]) -> None: ...

    def stopping(self) -> None:
        """Tell that the run ends after the step in hand; called by a signal handler."""
        ...


# total, first, steps_per_epoch, whether this process speaks -> what is told
Display = Callable[[int, int, int, bool], AbstractContextManager[Steps]]


class TrainProgress:
    """Shows the steps of a run, and a line of metrics behind them."""

    def __init__(self, total: int, first: int, steps_per_epoch: int, speaks: bool) -> None:
        self.total, self.first, self.steps_per_epoch = total, first, steps_per_epoch
        self._row: dict[str, Any] = {}
        self.bar = ProgressBar(
            "train", "steps", self._text, first=first, rated=True, smoothing=0.1, enabled=speaks
        )
        self.bar(first, total)

    def update_with(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Show that `step` is done, and the newest row whose values are known."""
        seen = {name: self._row[name] for name in PROBED if name in self._row}
        for row in rows:
            seen = {**seen, **{name: row[name] for name in PROBED if name in row}}
            self._row = {**row, **seen}
        self.bar(step, self.total)

    def stopping(self) -> None:
        if self.bar.enabled:
            preemption.note_stopping()

    def _text(self, done: int, total: int) -> str:
        return line(self._row, self.steps_per_epoch) if self._row else ""


def line(row: dict[str, Any], steps_per_epoch: int) -> str:
    """Return what stands behind the bar for a row of numbers; the bar itself shows steps, time
    passed and time left."""
    epoch = row["step"] / steps_per_epoch
    parts = {
        name: value
        for name, value in row.items()
        if name not in NOT_PARTS and not name.startswith(LONG)
    }
    losses = [
        f"loss {row['loss']:.4f}",
        *(f"{name} {value:.4g}" for name, value in parts.items()),
    ]
    return (
        f"epoch {epoch:.2f}  {' '.join(losses)}  lr {row['lr']:.2e}  "
        f"{rate_text(row['images_per_s'])}  waiting for data {row['data_wait']:.0%}  "
        f"{memory_bytes() / 1e9:.1f} GB"
    )


def rate_text(images_per_s: float) -> str:
    """Write a pace; slow ones, as on a CPU, with one more digit.

    >>> rate_text(812.3), rate_text(1.04)
    ('812 images/s', '1.0 images/s')
    """
    return f"{images_per_s:.{1 if images_per_s < 10 else 0}f} images/s"


def memory_bytes() -> int:
    """Return the most bytes that this process has used so far: of the GPU where there is one, else
    of the host."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return host_bytes()


def host_bytes() -> int:
    """Return the most resident bytes of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def shown(total: int, first: int, steps_per_epoch: int, speaks: bool) -> Iterator[TrainProgress]:
    """Show steps `first` to `total` of a run, in the process that `speaks`."""
    progress = TrainProgress(total, first, steps_per_epoch, speaks)
    with contextlib.closing(progress.bar):
        yield progress
